"""A grammar of attention programs: every sentence is one way of writing attention, with its inputs and expectation."""

import math
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from attention_cases.case import Draw, Sizes
from torch import Tensor

INF: Final = float("inf")

LAYOUTS: Final = (
    "heads_first",
    "rows_first",
    "keys_permuted",
    "keys_transposed",
    "folded",
    "folded_inside",
    "five",
    "one_head",
    "packed",
)
PRODUCTS: Final = ("matmul", "at", "method", "einsum", "reversed", "bmm", "baddbmm")
SCALES: Final = ("none", "divide", "multiply", "queries", "keys", "both", "tensor", "learned", "reflected")
BIASES: Final = ("none", "none", "heads", "full", "shared", "key", "alibi", "table", "reflected", "gate")
CAPS: Final = ("none", "none", "tanh", "clamp", "leaky")
MASKS: Final = (
    "causal_tril",
    "causal_triu",
    "causal_arange",
    "window",
    "prefix",
    "document",
    "padding",
    "given",
    "empty_row",
)
FILLS: Final = (
    "fill_inf",
    "fill_min",
    "fill_1e4",
    "where_inf",
    "where_min",
    "add_inf",
    "add_min",
    "inplace",
    "setitem",
)
_INFINITE: Final = {"fill_min": "fill_inf", "fill_1e4": "fill_inf", "where_min": "where_inf", "add_min": "add_inf"}
SOFTMAXES: Final = (
    "functional",
    "torch",
    "method",
    "exp",
    "exp_max",
    "log_softmax",
    "logsumexp",
    "late",
    "sink",
    "plus_one",
    "functional_float",
    "cast",
)
VALUES: Final = ("matmul", "at", "einsum", "bmm", "left")
GROUPS: Final = ("none", "none", "interleave", "expand", "tile", "broadcast")
TRAPS: Final = ("none",) * 7 + (
    "queries_axis",
    "weights_returned",
    "scores_returned",
    "weights_transposed",
    "weights_summed",
    "heads_mixed",
)
DTYPES: Final = ("float32", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Program:
    """One sentence of the grammar: every field is a choice; ``settled`` resolves combinations without meaning."""

    layout: str = "heads_first"
    product: str = "matmul"
    scale: str = "divide"
    bias: str = "none"
    cap: str = "none"
    cap_after_bias: bool = False
    masks: tuple[tuple[str, str], ...] = ()
    softmax: str = "functional"
    values: str = "matmul"
    groups: str = "none"
    dropout_call: bool = False
    flatten: bool = False
    trap: str = "none"
    dtype: str = "float32"
    training: bool = True
    sizes: Sizes = field(default_factory=Sizes)
    cross: bool = False

    def settled(self) -> "Program":
        """The nearest program that means something."""
        changes: dict[str, Any] = {}
        if self.layout in ("folded", "folded_inside", "one_head", "packed", "five") and self.groups != "none":
            changes["groups"] = "none"
        three = self.layout in ("folded", "folded_inside", "one_head")
        if not three and self.product in ("bmm", "baddbmm"):
            changes["product"] = "matmul"
        if not three and self.values == "bmm":
            changes["values"] = "matmul"
        groups = changes.get("groups", self.groups)
        if groups == "broadcast" and self.product == "einsum":
            changes["product"] = "at"
        if groups == "broadcast" and self.values == "einsum":
            changes["values"] = "at"
        if self.trap != "none" and self.softmax in ("late", "sink", "plus_one"):
            changes["softmax"] = "functional"
        if self.trap in ("queries_axis", "weights_transposed") or self.layout == "packed":
            changes["cross"] = False
        if self.trap in ("queries_axis", "weights_transposed"):
            changes["groups"] = "none"
        if self.softmax in ("exp", "logsumexp"):  # unguarded, they are no softmax where every logit is a finite minimum
            changes["masks"] = tuple((kind, _INFINITE.get(fill, fill)) for kind, fill in self.masks)
        if self.cap in ("clamp", "leaky") and self.dtype in ("float16", "bfloat16"):
            changes["cap"] = "tanh"  # a kink's gradient is a matter of chance where the scores are rounded so much
        if self.trap == "heads_mixed" and (three or groups == "broadcast" or self.layout == "five"):
            changes["trap"] = "none"
        return Program(**{**self.__dict__, **changes})

    @property
    def fuses(self) -> bool:
        """Whether it must be fused; over one key there is nothing to fuse, and powers beside an input that is added
        may have a sum of zero."""
        is_added = self.bias != "none" or any(fill == "add_inf" for _, fill in self.masks)
        powers = self.softmax in ("exp", "logsumexp") and is_added
        return self.trap == "none" and self.lengths[1] > 1 and not powers

    @property
    def refuses(self) -> bool:
        """Whether it must be left alone; over axes of size one the traps are no traps."""
        return self.trap != "none" and self.sizes.heads > 1 and min(self.lengths) > 1

    # ------------------------------------------------------------------------------------------ inputs
    @property
    def lengths(self) -> tuple[int, int]:
        return self.sizes.queries, self.sizes.keys if self.cross else self.sizes.queries

    @property
    def kv_heads(self) -> int:
        return self.sizes.heads if self.groups == "none" else self.sizes.kv_heads

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading sizes of the scores where the mask is applied."""
        b, h = self.sizes.batch, self.sizes.heads
        if self.layout == "five":
            return b, 2, h
        if self.layout == "folded":
            return (b * h,)
        if self.layout == "one_head":
            return (b,)
        if self.groups == "broadcast":
            return b, self.kv_heads, h // self.kv_heads
        return b, h

    def _operands(self, d: Draw) -> list[Tensor]:
        s, t = self.lengths
        b, h, g, width = self.sizes.batch, self.sizes.heads, self.kv_heads, self.sizes.features
        out = self.sizes.value_features
        if self.layout == "packed":
            return [d.normal(b, s, 3, h, width)]
        if self.layout in ("rows_first", "keys_permuted"):
            return [d.normal(b, s, h, width), d.normal(b, t, g, width), d.normal(b, t, g, out)]
        if self.layout == "keys_transposed":
            return [d.normal(b, h, s, width), d.normal(b, g, width, t), d.normal(b, g, t, out)]
        lead = {"five": (b, 2, h), "folded": (b * h,), "one_head": (b,)}.get(self.layout)
        q_lead, k_lead = (lead, lead) if lead else ((b, h), (b, g))
        return [d.normal(*q_lead, s, width), d.normal(*k_lead, t, width), d.normal(*k_lead, t, out)]

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """Fresh random inputs: the operands, then what scale, bias, masks and sink want."""
        d = Draw(self.sizes, getattr(torch, self.dtype), "cpu", seed)
        extra = [self._scale_input(d), self._bias_input(d), *(self._mask_input(d, kind) for kind, _ in self.masks)]
        if self.softmax == "sink":
            extra.append(d.normal(*(1 for _ in self.lead[:-1]), self.lead[-1], 1, 1))
        if self.trap == "heads_mixed":
            extra.append(d.normal(self.lead[-1], self.lead[-1]))
        return (*self._operands(d), *(x for x in extra if x is not None))

    def _scale_input(self, d: Draw) -> Tensor | None:
        return d.normal(self.lead[-1], 1, 1, scale=0.3) if self.scale == "learned" else None

    def _bias_input(self, d: Draw) -> Tensor | None:
        s, t = self.lengths
        ones = (1,) * (len(self.lead) - 1)
        shapes = {
            "heads": (*ones, self.lead[-1], s, t),
            "reflected": (*ones, self.lead[-1], s, t),
            "full": (*self.lead, s, t),
            "shared": (s, t),
            "key": (self.lead[0], *ones, 1, t),
            "gate": (self.lead[0], *ones, s, t),
            "alibi": (self.lead[-1],),
            "table": (9, self.lead[-1]),
        }
        return d.normal(*shapes[self.bias]) if self.bias in shapes else None

    def _mask_input(self, d: Draw, kind: str) -> Tensor | None:
        s, t = self.lengths
        ones = (1,) * (len(self.lead) - 1)
        n = self.lead[0]
        if kind == "document":
            return d.documents(n, max(s, t))
        if kind == "padding":
            return d.padding(n, t).view(n, *ones, 1, t)
        if kind == "given":
            return d.flags(n, *ones, s, t)
        if kind == "empty_row":
            keep = d.flags(n, *ones, s, t)
            keep[..., s // 2, :] = False
            return keep
        return None

    # ----------------------------------------------------------------------------------------- program
    def __call__(self, *inputs: Any) -> Any:
        """Run the program on tensors, or on whatever stands for them in a recording."""
        operands = 1 if self.layout == "packed" else 3
        rest = list(inputs[operands:])
        q, k, v = self._arranged(inputs[:operands])
        scores = self._scores(q, k, rest)
        scores = self._lifted(scores, rest)
        weights = self._weights(scores, rest)
        result = self._output(weights, v)
        if self.trap == "weights_returned":
            return result, weights
        if self.trap == "weights_summed":
            return result, weights.sum(-2)
        if self.trap == "scores_returned":
            return result, scores
        return result

    def _arranged(self, operands: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        if self.layout == "packed":
            return tuple(x.transpose(1, 2) for x in operands[0].unbind(2))  # type: ignore[return-value]
        q, k, v = operands
        if self.layout in ("rows_first", "keys_permuted"):
            q, v = q.transpose(1, 2), v.permute(0, 2, 1, 3)
            k = k.transpose(1, 2) if self.layout == "rows_first" or self.groups != "none" else k.permute(0, 2, 3, 1)
        if self.layout == "keys_transposed" and self.groups != "none":
            k = k.transpose(-1, -2)
        q, k, v = self._grouped(q, k, v)
        if self.layout == "folded_inside":
            b, h = q.shape[:2]
            q, k, v = (x.reshape(b * h, x.shape[-2], x.shape[-1]) for x in (q, k, v))
        return q, k, v

    def _grouped(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        rate = self.sizes.heads // self.kv_heads
        if self.groups == "interleave":
            return q, k.repeat_interleave(rate, dim=1), torch.repeat_interleave(v, rate, 1)
        if self.groups == "tile":
            return q, k.repeat(1, rate, 1, 1), v.repeat(1, rate, 1, 1)
        if self.groups == "broadcast":
            return q.unflatten(1, (self.kv_heads, rate)), k.unsqueeze(2), v.unsqueeze(2)
        if self.groups == "expand":

            def repeated(x: Any) -> Any:
                b, g, t, d = x.shape
                return x[:, :, None].expand(b, g, rate, t, d).reshape(b, g * rate, t, d)

            return q, repeated(k), repeated(v)
        return q, k, v

    @property
    def _keys_are_transposed(self) -> bool:
        return self.layout in ("keys_transposed", "keys_permuted") and self.groups == "none"

    def _scores(self, q: Any, k: Any, rest: list[Any]) -> Any:
        root = math.sqrt(self.sizes.features)
        if self.scale in ("queries", "both"):
            q = q * (root**-0.5 if self.scale == "both" else 1 / root)
        if self.scale in ("keys", "both"):
            k = k / (root**0.5 if self.scale == "both" else root)
        scores = self._product(q, k, root)
        if self.layout == "folded_inside":
            scores = scores.view(*self.lead, *self.lengths)
        if self.scale == "divide":
            return scores / root
        if self.scale == "multiply":
            return scores * root**-1
        if self.scale == "reflected":
            return 0.3 * scores
        if self.scale == "tensor":
            return scores / torch.tensor(root, dtype=getattr(torch, self.dtype))
        return scores * rest.pop(0).exp() if self.scale == "learned" else scores

    def _product(self, q: Any, k: Any, root: float) -> Any:
        flipped = k if self._keys_are_transposed else k.transpose(-1, -2)
        if self.product == "einsum":
            letters = "abc"[: len(q.shape) - 2]
            right = f"{letters}dk" if self._keys_are_transposed else f"{letters}kd"
            return torch.einsum(f"{letters}qd,{right}->{letters}qk", q, k)
        if self.product == "reversed":
            return torch.matmul(flipped.transpose(-1, -2), q.transpose(-1, -2)).transpose(-1, -2)
        if self.product == "bmm":
            return torch.bmm(q, flipped)
        if self.product == "baddbmm":
            start = torch.zeros(q.shape[0], *self.lengths, dtype=q.dtype)
            return torch.baddbmm(start, q, flipped, beta=0, alpha=1 / root)
        if self.product == "method":
            return q.matmul(flipped)
        return q @ flipped if self.product == "at" else torch.matmul(q, flipped)

    def _lifted(self, scores: Any, rest: list[Any]) -> Any:
        if not self.cap_after_bias:
            scores = self._capped(scores)
        scores = self._biased(scores, rest)
        if self.cap_after_bias:
            scores = self._capped(scores)
        for kind, fill in self.masks:
            scores = self._masked(scores, self._keep(kind, rest), fill)
        if self.trap == "heads_mixed":
            axes = "abc"[: len(self.lead) - 1]
            scores = torch.einsum(f"{axes}hqk,hg->{axes}gqk", scores, rest.pop(0))
        return scores

    def _capped(self, scores: Any) -> Any:
        if self.cap == "tanh":
            return torch.tanh(scores / 3.0) * 3.0
        if self.cap == "clamp":
            return scores.clamp(-1.5, 1.5)
        if self.cap == "leaky":
            return F.leaky_relu(scores, 0.1)
        return scores

    def _biased(self, scores: Any, rest: list[Any]) -> Any:
        if self.bias == "none":
            return scores
        bias, (s, t) = rest.pop(0), self.lengths
        distance = torch.arange(t)[None, :] - torch.arange(s)[:, None]
        if self.bias == "alibi":
            return scores + bias[:, None, None] * distance.abs().to(scores.dtype)
        if self.bias == "table":
            return scores + bias[distance.clamp(-4, 4) + 4].permute(2, 0, 1)
        if self.bias == "gate":
            return scores * torch.sigmoid(bias)
        return bias + scores if self.bias == "reflected" else torch.add(scores, bias)

    def _keep(self, kind: str, rest: list[Any]) -> Any:
        s, t = self.lengths
        rows, columns = torch.arange(s)[:, None], torch.arange(t)[None, :]
        if kind == "causal_tril":
            return torch.tril(torch.ones(s, t, dtype=torch.bool))
        if kind == "causal_triu":
            return torch.ones(s, t).triu(1) == 0
        if kind == "causal_arange":
            return columns <= rows
        if kind == "window":
            return (rows - columns).abs() < 3
        if kind == "prefix":
            return torch.logical_or(columns <= rows, columns < 2)
        if kind == "document":
            documents, ones = rest.pop(0), (1,) * (len(self.lead) - 1)
            n = self.lead[0]
            return documents[:, :s].view(n, *ones, s, 1) == documents[:, :t].view(n, *ones, 1, t)
        return rest.pop(0)

    def _masked(self, scores: Any, keep: Any, fill: str) -> Any:
        least = torch.finfo(scores.dtype).min
        if fill == "fill_inf":
            return scores.masked_fill(~keep, -INF)
        if fill == "fill_min":
            return torch.masked_fill(scores, keep.logical_not(), least)
        if fill == "fill_1e4":
            return scores.masked_fill(keep == 0, -1e4)
        if fill in ("where_inf", "where_min"):
            return torch.where(keep, scores, -INF if fill == "where_inf" else least)
        if fill == "add_inf":
            return scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, -INF)
        if fill == "add_min":
            return scores + (1.0 - keep.to(scores.dtype)) * least
        scores = scores * 1.0  # a fresh tensor to write to
        if fill == "inplace":
            scores.masked_fill_(~keep, -INF)
        else:
            scores[(~keep).expand(scores.shape)] = -INF
        return scores

    def _weights(self, scores: Any, rest: list[Any]) -> Any:
        if self.layout == "folded_inside":
            scores = scores.view(-1, *self.lengths)
        dim = -2 if self.trap == "queries_axis" else -1
        weights = self._softmax(scores, dim, rest)
        if self.dropout_call and self.softmax != "late":
            weights = F.dropout(weights, p=0.0, training=self.training)
        return weights

    def _softmax(self, scores: Any, dim: int, rest: list[Any]) -> Any:
        kind = self.softmax
        if kind == "torch":
            return torch.softmax(scores, dim)
        if kind == "method":
            return scores.softmax(dim=dim)
        if kind == "functional_float":
            return F.softmax(scores, dim=dim, dtype=torch.float32).to(scores.dtype)
        if kind == "cast":
            return F.softmax(scores.float(), dim=dim).type_as(scores)
        if kind == "log_softmax":
            return F.log_softmax(scores, dim=dim).exp()
        if kind == "logsumexp":
            return torch.exp(scores - torch.logsumexp(scores, dim, keepdim=True))
        if kind == "exp":
            weights = scores.exp()
            return weights / weights.sum(dim, keepdim=True)
        if kind == "exp_max":
            weights = torch.exp(scores - scores.amax(dim=dim, keepdim=True))
            return weights / torch.sum(weights, dim=dim, keepdim=True)
        if kind == "late":
            return torch.exp(scores - scores.max(dim, keepdim=True)[0].detach())
        if kind == "sink":
            sink = rest.pop(0).expand(*self.lead, self.lengths[0], 1)
            sink = sink.reshape(-1, self.lengths[0], 1) if self.layout == "folded_inside" else sink
            return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        if kind == "plus_one":
            return F.softmax(F.pad(scores, (0, 1)), dim=-1)[..., :-1]
        return F.softmax(scores, dim=dim)

    def _output(self, weights: Any, v: Any) -> Any:
        total = weights.sum(-1, keepdim=True) if self.softmax == "late" else None
        if self.trap == "weights_transposed":
            weights = weights.transpose(-1, -2)
        out = self._applied(weights, v)
        out = out / total if total is not None else out
        if self.layout == "folded_inside":
            out = out.view(*self.lead, *out.shape[-2:])
        if self.groups == "broadcast":
            out = out.flatten(1, 2)
        return out.transpose(1, 2).flatten(2) if self.flatten and len(out.shape) == 4 else out

    def _applied(self, weights: Any, v: Any) -> Any:
        if self.values == "einsum":
            letters = "abc"[: len(weights.shape) - 2]
            return torch.einsum(f"{letters}qk,{letters}kd->{letters}qd", weights, v)
        if self.values == "bmm":
            return torch.bmm(weights, v)
        if self.values == "left":
            return torch.matmul(v.transpose(-1, -2), weights.transpose(-1, -2)).transpose(-1, -2)
        return weights @ v if self.values == "at" else torch.matmul(weights, v)
