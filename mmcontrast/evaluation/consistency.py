"""Measure the consistency of retrieval over languages: the variance of a sample's rank."""

from torch import Tensor

from mmcontrast.evaluation.bootstrap import Estimate


def mean_rank_variance(ranks: Tensor) -> Estimate:
    """Compute 1/(N·K) Σ_i Σ_k (rank_ik − mean_k rank_ik)²: the variance over K languages of a sample's rank, averaged over
    N samples (Mean Rank Variance of "Improving the Consistency in Cross-Lingual Cross-Modal Retrieval with 1-to-K Contrastive
    Learning", KDD 2024, arXiv:2406.18254): 0 where every language ranks alike.

    Args:
        ranks: [N, K], from 1; samples with a rank of 0, which have no hit in some language, are left out.
    """
    ranks = ranks[(ranks > 0).all(1)].double()
    return Estimate.of_mean(ranks.var(1, correction=0))
