"""Stand-ins for PyTorch's kernels of flash attention over sequences of various lengths, which CPUs have none of: in plain operations."""

from itertools import pairwise

import torch


class VarlenOperations:
    """In the place of `torch.ops.aten`. What the kernels ask of their arguments is asserted."""

    def __init__(self, later: int = 0, wider: int = 0):
        """Mistakes to be found: queries see `later` keys too many, windows are `wider`."""
        self.later, self.wider, self.calls = later, wider, 0

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right
    ):
        assert not debug
        assert causal == (window_size_left == -1)
        assert not window_size_right
        out, sums = self._forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, window_size_left)
        return out, sums, torch.zeros(2), torch.zeros(()), torch.empty(0)

    def _flash_attention_backward(
        self, dout, q, k, v, out, sums, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale, window_size_left,
        window_size_right,
    ):  # fmt: skip
        assert causal == (window_size_left == -1)
        assert not window_size_right
        assert len(state) == 2
        assert not unused.ndim
        return self._backward(dout, q, k, v, out, sums, cu_q, cu_k, max_q, max_k, dropout, scale, window_size_left)

    def _efficient_attention_forward(
        self, q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask, with_sums, *, scale, window_size
    ):
        assert bias is None
        assert mask == 2
        assert with_sums
        assert q.shape[2] == k.shape[2]
        assert len(q) == len(k) == len(v) == 1
        left = -1 if window_size is None else window_size - 1
        out, sums = self._forward(q[0], k[0], v[0], cu_q, cu_k, max_q, max_k, dropout, scale, left)
        return out[None], sums, torch.zeros(()), torch.zeros(()), max_q, max_k

    def _efficient_attention_backward(
        self, dout, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, sums, dropout, seed, offset, mask, of_bias, *, scale,
        window_size,
    ):  # fmt: skip
        assert bias is None
        assert mask == 2
        assert not of_bias
        assert not seed.ndim
        assert not offset.ndim
        left = -1 if window_size is None else window_size - 1
        given = dout[0], q[0], k[0], v[0], out[0], sums, cu_q, cu_k, max_q, max_k, dropout, scale, left
        return *(t[None] for t in self._backward(*given)), torch.empty(0)

    def _forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, left):
        out, sums = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys in self._sequences(q, k, v, cu_q, cu_k, max_q, max_k, dropout):
            scores = self._scores(q[rows], k[keys], scale, left)
            sums[:, rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _each(v[keys], q)).to(q.dtype)
        return out, sums

    def _backward(self, dout, q, k, v, out, sums, cu_q, cu_k, max_q, max_k, dropout, scale, left):
        assert dout.is_contiguous()
        assert dout.dtype == q.dtype == out.dtype
        assert sums.shape == (q.shape[1], len(q))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys in self._sequences(q, k, v, cu_q, cu_k, max_q, max_k, dropout):
            of_out, p = dout[rows].to(sums.dtype), (self._scores(q[rows], k[keys], scale, left) - sums[:, rows, None]).exp()
            even = (of_out * out[rows]).sum(-1).T
            ds = p * (torch.einsum("qhd,khd->hqk", of_out, _each(v[keys], q)) - even[..., None]) * scale
            dq[rows] = torch.einsum("hqk,khd->qhd", ds, _each(k[keys], q)).to(q.dtype)
            of_k, of_v = torch.einsum("hqk,qhd->khd", ds, q[rows].to(ds.dtype)), torch.einsum("hqk,qhd->khd", p, of_out)
            dk[keys], dv[keys] = (t.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for t in (of_k, of_v))
        return dq, dk, dv

    def _sequences(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout):
        self.calls += 1
        assert not dropout
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert q.dtype == k.dtype == v.dtype
        assert q.shape[2] == k.shape[2]
        assert k.shape == v.shape
        assert not q.shape[1] % k.shape[1]
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        queries, keys = (list(pairwise(cu.tolist())) for cu in (cu_q, cu_k))
        assert queries[-1][1] == len(q)
        assert keys[-1][1] == len(k)
        assert queries[0][0] == keys[0][0] == 0
        for spans, longest in ((queries, max_q), (keys, max_k)):
            assert max(end - start for start, end in spans) == longest
            assert min(end - start for start, end in spans) > 0
        return [(slice(*a), slice(*b)) for a, b in zip(queries, keys, strict=True)]

    def _scores(self, q, k, scale, left):
        place, key = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
        seen = key <= place + self.later if left < 0 else (key <= place + self.later) & (key >= place - left - self.wider)
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("qhd,khd->hqk", q.to(exact), _each(k, q)) * scale
        return scores.masked_fill(~seen, float("-inf"))


def _each(t, q):
    """Of each query head, in the type in which kernels sum."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1).to(torch.promote_types(t.dtype, torch.float32))
