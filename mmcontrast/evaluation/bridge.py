"""Score rows of two fields that were never trained together, by their distributions over a bank of entries that both know.

p(t|e) = softmax_t(κ e·b_t) is a distribution over the entries t of the bank: captions, say. The score of two rows is the
Bhattacharyya coefficient of their distributions, Σ_t √p(t|q) √p(t|c), in [0, 1]. C-MCR (arXiv:2305.14381) takes expected rows,
Σ_t p(t|e) b_t, of such a memory as training pairs for its projectors; here nothing is trained.

Shapes: B entries, which the queries' model embeds with D numbers and the candidates' with E; Q queries, C candidates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = 2**23  # elements of p (rows × entries) in memory at once: 32 MiB


@dataclass(frozen=True)
class Bridge:
    """A bank of entries, in the space of the queries and in that of the candidates.

    Attributes:
        queries, candidates: unit rows [B, D] and [B, E] of the same entries: one tensor where one model embeds both.
        query_scale, candidate_scale: κ of each.
    """

    queries: Tensor
    candidates: Tensor
    query_scale: float
    candidate_scale: float

    def __post_init__(self) -> None:
        if self.queries.dim() != 2 or self.candidates.dim() != 2 or len(self.queries) != len(self.candidates):
            shapes = f"{tuple(self.queries.shape)} and {tuple(self.candidates.shape)}"
            raise ValueError(f"a bank is rows [B, D] of the same entries on both sides, not {shapes}")
        if not len(self.queries):
            raise ValueError("a bank has one entry at least")
        if not (self.query_scale > 0 and self.candidate_scale > 0):
            raise ValueError(f"scales are more than 0, not {self.query_scale:g} and {self.candidate_scale:g}")

    def prefix(self, width: int) -> "Bridge":
        """Return the bridge of the first `width` numbers of embeddings of one model."""
        bank = F.normalize(self.queries[:, :width], dim=1)
        return Bridge(bank, bank, self.query_scale, self.candidate_scale)

    @torch.no_grad()
    def lift(self, rows: Tensor, candidates: bool = False) -> Tensor:
        """Return rows for `products`: [N, D + 1] of queries [N, D], or [N, E + 1] of candidates [N, E]; float32, or float64 of
        float64 rows. The last number is minus half the logarithm of the softmax's denominator."""
        bank, scale = self._side(candidates, rows)
        rows = rows.to(bank.dtype)
        lifted = rows.new_empty(len(rows), rows.shape[1] + 1)  # at once: results between parts would keep their memory apart
        lifted[:, :-1] = scale / 2 * rows
        for target, part in zip(lifted.split(self._rows_at_once()), rows.split(self._rows_at_once()), strict=True):
            target[:, -1] = (scale * part @ bank.T).logsumexp(1) / -2
        return lifted

    @torch.no_grad()
    def products(self, queries: Tensor, candidates: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the scores [Q, C] of lifted rows, a block of entries at a time: O((Q + C)·(D + block)) beside them."""
        out = queries.new_empty(len(queries), len(candidates)) if out is None else out
        query_bank = F.pad(self._side(False, queries)[0], (0, 1), value=1.0)
        candidate_bank = F.pad(self._side(True, candidates)[0], (0, 1), value=1.0)
        block = max(1, WEIGHTS // max(1, len(queries) + len(candidates)))
        for start in range(0, len(query_bank), block):
            query_roots = torch.mm(queries, query_bank[start : start + block].T).exp_()  # √p
            candidate_roots = torch.mm(candidates, candidate_bank[start : start + block].T).exp_()
            out.addmm_(query_roots, candidate_roots.T, beta=min(start, 1))
        return out

    def rounding(self, queries: Tensor, candidates: Tensor, products: Tensor) -> Tensor:
        """Return a bound on the rounding error of the scores [Q, C] of lifted rows."""
        norms = queries.norm(dim=1, keepdim=True) + candidates.norm(dim=1)
        return 4 * torch.finfo(products.dtype).eps * norms * products

    def scores(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Return the scores [Q, C] of unit rows [Q, D] and [C, E]."""
        return self.products(self.lift(queries), self.lift(candidates, candidates=True))

    @torch.no_grad()
    def expected(self, rows: Tensor, candidates: bool = False) -> Tensor:
        """Return the expected entries Σ_t p(t|e) b_t in the candidates' space, as unit rows [N, E], of queries [N, D] or
        candidates [N, E]: their cosines approximate the scores where an index needs rows."""
        bank, scale = self._side(candidates, rows)
        entries = self._side(True, rows)[0]
        rows, size = rows.to(bank.dtype), self._rows_at_once()
        means = rows.new_empty(len(rows), entries.shape[1])
        for target, part in zip(means.split(size), rows.split(size), strict=True):
            torch.mm((scale * part @ bank.T).softmax(1), entries, out=target)
        return F.normalize(means, dim=1)

    def _side(self, candidates: bool, rows: Tensor) -> tuple[Tensor, float]:
        bank, scale = (self.candidates, self.candidate_scale) if candidates else (self.queries, self.query_scale)
        return bank.to(rows.device, torch.promote_types(rows.dtype, torch.float32)), scale

    def _rows_at_once(self) -> int:
        return max(1, WEIGHTS // len(self.queries))


def mean_rows(rows: Tensor, groups: Tensor) -> Tensor:
    """Return one unit row a group: the direction of the mean of its rows [N, D], in the order of the groups' ids [N]."""
    _, number = groups.unique(return_inverse=True)
    sums = rows.new_zeros(int(number.max()) + 1, rows.shape[1]).index_add_(0, number, rows)
    return F.normalize(sums, dim=1)
