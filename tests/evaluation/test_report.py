"""The first part of a run's page: the main numbers, as a browser would read them."""

import math
import re

from mmcontrast.evaluation.report import _summary
from mmcontrast.evaluation.results import Evaluation


def cells_of(html):
    return [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<td[^>]*>(.*?)</td>", html)]


def test_pairs_are_a_matrix_and_tasks_a_table():
    values = {
        "val/retrieval/image_to_text/recall_at_1": 0.5,
        "val/retrieval/image_to_text/recall_at_5": 0.9,
        "val/retrieval/text_to_image/recall_at_1": 0.25,
        "val/retrieval/text_to_a<b/recall_at_1": math.nan,  # nobody has both fields
        "val/retrieval/mean_recall_at_1": 0.375,
        "val/zero_shot/script/top1": 0.8,
        "val/zero_shot/script/macro_f1": 0.7,
        "other/zero_shot/script/top1": 0.6,
    }
    html = _summary(Evaluation(values=values, intervals={"val/retrieval/image_to_text/recall_at_1": (0.4, 0.61)}))
    matrix, _, table = html.partition("</tbody>")
    assert html.count("<caption>") == 1 and "val: recall at 1" in matrix and "a&lt;b" in matrix and "a<b" not in html
    assert re.findall(r'scope="row">([^<]*)<', matrix) == ["a&lt;b", "image", "text"]  # columns are in the same order
    assert cells_of(matrix) == [[], [], [], [], [], ["0.500", "0.400", "to", "0.610"], [], ["0.250"], []]
    strengths = [float(strength) for strength in re.findall(r"rgba\(40,120,200,([\d.]+)\)", matrix)]
    assert strengths == [0.325, 0.163]
    rows = [["retrieval/mean_recall_at_1"], ["0.375"], [], ["zero_shot/script/top1"], ["0.800"], ["0.600"]]
    assert cells_of(table) == rows


def test_where_there_is_neither_all_results_are_shown():
    html = _summary(Evaluation(values={"val/retrieval/image_to_text/recall_at_5": 0.9}, notes=["a note"]))
    assert cells_of(html) == [["retrieval/image_to_text/recall_at_5"], ["0.900"]] and "a note" in html and "heat" not in html
