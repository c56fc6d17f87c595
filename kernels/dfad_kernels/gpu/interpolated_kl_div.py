"""Triton kernels of the interpolated KL divergence, over logits of shape (samples, classes, sites).

A program keeps a few rows of logits in registers, so that the forward and the backward pass read them once each; a row
is one site of one sample. Rows of more than ``RESIDENT_CLASSES`` classes are read in chunks. Their softmax is known
only after a first pass over the row, which the forward kernel makes; it saves the result for the backward kernel.

In the equations s and t are the logits of student and teacher, p and q their probabilities, u the teacher's for the
partner row, w the mixing coefficient, g the incoming gradient, h the gradient with respect to the label.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfad_kernels.gpu.common import compute_type, warp_size
from dfad_kernels.interpolated_kl_div import RESIDENT_CLASSES

CHUNK = 4096


class Shares(NamedTuple):
    """Elements of one tensor: at least as many per program, at most as many per thread."""

    program: int
    thread: int


FORWARD = Shares(program=2048, thread=16)
"""Three tensors are in registers at once."""

BACKWARD = Shares(program=1024, thread=8)
"""Up to five tensors are in registers at once."""

BACKWARD_NARROW = Shares(program=2048, thread=8)
"""For dtypes of 16 bits: eight elements are one access of 128 bits."""


@triton.jit
def _rows(samples, sites, REVERSED: tl.constexpr, ROWS: tl.constexpr):
    """Sample and site of this program's rows. A sample has fewer than 2³¹ sites; all of them together may have more."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    first = start // sites
    site = (start - first * sites).to(tl.int32) + tl.arange(0, ROWS)
    sample = first + site // sites
    inside = sample < samples
    if REVERSED:  # partners alternate, so that a row is still in the cache when it is read again
        sample = tl.where(sample % 2 == 0, sample // 2, samples - 1 - sample // 2)
    return sample, site % sites, inside


@triton.jit
def _partner(partner_ptr, sample, inside, samples, REVERSED: tl.constexpr):
    """The row to mix with, and whether it exists; if not, its logits are read as -inf, and the row becomes NaN."""
    if REVERSED:
        other = samples - 1 - sample
    else:
        other = tl.load(partner_ptr + sample, mask=inside, other=-1)
    return other, inside & (other >= 0) & (other < samples)


@triton.jit
def _inverse(inverse_ptr, partner_ptr, sample, inside, samples, REVERSED: tl.constexpr):
    """The row that mixes with this one; it does not exist where partner is no permutation."""
    if REVERSED:
        other = samples - 1 - sample
        exists = inside
    else:
        other = tl.load(inverse_ptr + sample, mask=inside, other=0)
        exists = inside & (tl.load(partner_ptr + other) == sample)
    return other, exists


@triton.jit
def _offsets(sample, site, c, classes, sites, CLASSES_LAST: tl.constexpr):
    if CLASSES_LAST:
        rows = (sample * sites + site) * classes
        columns = c.to(tl.int64)
    else:
        rows = sample * classes * sites + site
        columns = c.to(tl.int64) * sites
    return rows[:, None] + columns[None, :]


@triton.jit
def _load(ptr, sample, site, exists, c, classes, sites, CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr):
    offsets = _offsets(sample, site, c, classes, sites, CLASSES_LAST)
    mask = exists[:, None] & (c < classes)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=float("-inf")).to(DTYPE)


@triton.jit
def _store(ptr, value, sample, site, inside, c, classes, sites, CLASSES_LAST: tl.constexpr):
    offsets = _offsets(sample, site, c, classes, sites, CLASSES_LAST)
    tl.store(ptr + offsets, value, mask=inside[:, None] & (c < classes)[None, :])


@triton.jit
def _softmax(x, inverse_temperature):
    """Probabilities and their logarithms from all classes of a row."""
    z = (x - tl.max(x, 1, keep_dims=True)) * inverse_temperature
    e = tl.exp(z)
    total = tl.sum(e, 1, keep_dims=True)
    return e * (1 / total), z - tl.log(total)


@triton.jit
def _probabilities(
    s_ptr, t_ptr, sample, other, site, inside, exists, c, classes, sites, inverse_temperature,
    CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The student's with their logarithms, the teacher's, and the teacher's for the partner rows; of whole rows."""
    s = _load(s_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
    t = _load(t_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
    t_other = _load(t_ptr, other, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
    p, log_p = _softmax(s, inverse_temperature)
    q, _ = _softmax(t, inverse_temperature)
    u, _ = _softmax(t_other, inverse_temperature)
    return p, log_p, q, u


@triton.jit
def _normalize(x, top, log_total, inverse_temperature):
    """Probabilities and their logarithms from some classes of a row."""
    log_p = (x - top) * inverse_temperature - log_total
    return tl.exp(log_p), log_p


@triton.jit
def _statistics(
    ptr, sample, site, exists, classes, sites, inverse_temperature,
    CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Largest logit, and logarithm of the softmax's denominator relative to it, in one pass over a row."""
    top = tl.full((ROWS, 1), float("-inf"), DTYPE)
    total = tl.zeros((ROWS, 1), DTYPE)
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        x = _load(ptr, sample, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
        higher = tl.maximum(top, tl.max(x, 1, keep_dims=True))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no finite logit yet
        total *= tl.exp((top - shift) * inverse_temperature)
        total += tl.sum(tl.exp((x - shift) * inverse_temperature), 1, keep_dims=True)
        top = higher
    return top, tl.log(total)


@triton.jit
def _log_ratio(label, p, log_p):
    """log(label / p): 0 where the label is 0, and exactly 0 where both agree."""
    return tl.where((label == 0) | (label == p), 0.0, tl.log(label) - log_p)


@triton.jit
def _times(probability, value):
    """Their product, where 0 · ∞ is 0."""
    return tl.where(probability == 0, 0.0, probability * value)


@triton.jit
def _centred(q, h):
    """h minus its mean under q; the second subtraction corrects the rounding error of Σ q in the first."""
    h -= tl.sum(_times(q, h), 1, keep_dims=True)
    return h - tl.sum(_times(q, h), 1, keep_dims=True)


@triton.jit
def _interpolated_kl_forward_kernel(
    loss_ptr, s_ptr, t_ptr, w_ptr, partner_ptr, samples, classes, sites, w_stride,
    temperature: tl.float64, scale: tl.float64,
    ELEMENTWISE: tl.constexpr, REVERSED: tl.constexpr, CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    inverse_temperature = tl.full((), 1 / temperature, DTYPE)
    c = tl.arange(0, CLASSES)
    sample, site, inside = _rows(samples, sites, REVERSED, ROWS)
    other, exists = _partner(partner_ptr, sample, inside, samples, REVERSED)
    w = tl.load(w_ptr + sample * w_stride, mask=inside, other=0.0)[:, None]
    p, log_p, q, u = _probabilities(
        s_ptr, t_ptr, sample, other, site, inside, exists, c, classes, sites, inverse_temperature, CLASSES_LAST, DTYPE
    )
    label = w * q + (1 - w) * u
    term = label * _log_ratio(label, p, log_p)
    factor = tl.full((), scale * temperature * temperature, DTYPE)
    if ELEMENTWISE:
        _store(loss_ptr, term * factor, sample, site, inside, c, classes, sites, CLASSES_LAST)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(inside[:, None], term, 0.0)) * factor)


@triton.jit
def _interpolated_kl_forward_chunked_kernel(
    loss_ptr, saved_ptr, s_ptr, t_ptr, w_ptr, partner_ptr, samples, classes, sites, w_stride,
    temperature: tl.float64, scale: tl.float64,
    ELEMENTWISE: tl.constexpr, REVERSED: tl.constexpr, CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    inverse_temperature = tl.full((), 1 / temperature, DTYPE)
    factor = tl.full((), scale * temperature * temperature, DTYPE)
    sample, site, inside = _rows(samples, sites, REVERSED, ROWS)
    other, exists = _partner(partner_ptr, sample, inside, samples, REVERSED)
    w = tl.load(w_ptr + sample * w_stride, mask=inside, other=0.0)[:, None]
    top_s, log_total_s = _statistics(
        s_ptr, sample, site, inside, classes, sites, inverse_temperature, CLASSES_LAST, DTYPE, ROWS, CLASSES
    )
    top_t, log_total_t = _statistics(
        t_ptr, sample, site, inside, classes, sites, inverse_temperature, CLASSES_LAST, DTYPE, ROWS, CLASSES
    )
    top_u, log_total_u = _statistics(
        t_ptr, other, site, exists, classes, sites, inverse_temperature, CLASSES_LAST, DTYPE, ROWS, CLASSES
    )
    loss = tl.zeros((ROWS, CLASSES), DTYPE)
    own_mean = tl.zeros((ROWS, CLASSES), DTYPE)
    partner_mean = tl.zeros((ROWS, CLASSES), DTYPE)
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        s = _load(s_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
        t = _load(t_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
        t_other = _load(t_ptr, other, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
        p, log_p = _normalize(s, top_s, log_total_s, inverse_temperature)
        q, _ = _normalize(t, top_t, log_total_t, inverse_temperature)
        u, _ = _normalize(t_other, top_u, log_total_u, inverse_temperature)
        label = w * q + (1 - w) * u
        ratio = _log_ratio(label, p, log_p)
        if ELEMENTWISE:
            _store(loss_ptr, label * ratio * factor, sample, site, inside, c, classes, sites, CLASSES_LAST)
        loss += label * ratio
        own_mean += _times(q, ratio)
        partner_mean += _times(u, ratio)
    if not ELEMENTWISE:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(inside[:, None], loss, 0.0)) * factor)
    row = (sample * sites + site)[:, None]
    rows = samples.to(tl.int64) * sites
    tl.store(saved_ptr + row, top_s, mask=inside[:, None])
    tl.store(saved_ptr + row + rows, log_total_s, mask=inside[:, None])
    tl.store(saved_ptr + row + 2 * rows, top_t, mask=inside[:, None])
    tl.store(saved_ptr + row + 3 * rows, log_total_t, mask=inside[:, None])
    tl.store(saved_ptr + row + 4 * rows, tl.sum(own_mean, 1, keep_dims=True), mask=inside[:, None])
    tl.store(saved_ptr + row + 5 * rows, tl.sum(partner_mean, 1, keep_dims=True), mask=inside[:, None])


@triton.jit
def _student_gradient(p, label, g, total):
    """p Σ g ỹ − g ỹ, exactly 0 where label and student agree and g is constant."""
    return p * total - _times(label, g)


@triton.jit
def _interpolated_kl_backward_kernel(
    ds_ptr, dt_ptr, g_ptr, s_ptr, t_ptr, w_ptr, partner_ptr, inverse_ptr, samples, classes, sites, w_stride,
    temperature: tl.float64, scale: tl.float64,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    ELEMENTWISE: tl.constexpr, REVERSED: tl.constexpr, CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    inverse_temperature = tl.full((), 1 / temperature, DTYPE)
    factor = tl.full((), scale * temperature, DTYPE)
    c = tl.arange(0, CLASSES)
    sample, site, inside = _rows(samples, sites, REVERSED, ROWS)
    other, exists = _partner(partner_ptr, sample, inside, samples, REVERSED)
    w = tl.load(w_ptr + sample * w_stride, mask=inside, other=0.0)[:, None]
    p, log_p, q, u = _probabilities(
        s_ptr, t_ptr, sample, other, site, inside, exists, c, classes, sites, inverse_temperature, CLASSES_LAST, DTYPE
    )
    label = w * q + (1 - w) * u
    if ELEMENTWISE:
        g = _load(g_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
    else:
        factor *= tl.load(g_ptr)
    if STUDENT:
        if ELEMENTWISE:
            ds = _student_gradient(p, label, g, tl.sum(_times(label, g), 1, keep_dims=True))
        else:
            ds = tl.where(p == label, 0.0, p - label)  # a multiply-add with the product in p would not be exactly 0
        _store(ds_ptr, ds * factor, sample, site, inside, c, classes, sites, CLASSES_LAST)
    if TEACHER:
        h = _log_ratio(label, p, log_p)
        if ELEMENTWISE:
            h = g * (h + 1)
        dt = w * _times(q, _centred(q, h))

        source, exists = _inverse(inverse_ptr, partner_ptr, sample, inside, samples, REVERSED)
        s = _load(s_ptr, source, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
        p, log_p = _softmax(s, inverse_temperature)
        if not REVERSED:
            t_source = _load(t_ptr, source, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
            u, _ = _softmax(t_source, inverse_temperature)
        w = tl.load(w_ptr + source * w_stride, mask=inside, other=0.0)[:, None]
        label = w * u + (1 - w) * q
        h = _log_ratio(label, p, log_p)
        if ELEMENTWISE:
            h = (h + 1) * _load(g_ptr, source, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
        dt += (1 - w) * _times(q, _centred(q, h))
        _store(dt_ptr, dt * factor, sample, site, inside, c, classes, sites, CLASSES_LAST)


@triton.jit
def _saved(saved_ptr, k: tl.constexpr, row, rows, exists):
    return tl.load(saved_ptr + row + k * rows, mask=exists, other=float("nan"))[:, None]


@triton.jit
def _interpolated_kl_backward_chunked_kernel(
    ds_ptr, dt_ptr, g_ptr, saved_ptr, s_ptr, t_ptr, w_ptr, partner_ptr, inverse_ptr, samples, classes, sites, w_stride,
    temperature: tl.float64, scale: tl.float64,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    ELEMENTWISE: tl.constexpr, REVERSED: tl.constexpr, CLASSES_LAST: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    inverse_temperature = tl.full((), 1 / temperature, DTYPE)
    factor = tl.full((), scale * temperature, DTYPE)
    sample, site, inside = _rows(samples, sites, REVERSED, ROWS)
    other, exists = _partner(partner_ptr, sample, inside, samples, REVERSED)
    w = tl.load(w_ptr + sample * w_stride, mask=inside, other=0.0)[:, None]
    rows = samples.to(tl.int64) * sites
    row = sample * sites + site
    row_other = other * sites + site
    top_s = _saved(saved_ptr, 0, row, rows, inside)
    log_total_s = _saved(saved_ptr, 1, row, rows, inside)
    top_t = _saved(saved_ptr, 2, row, rows, inside)
    log_total_t = _saved(saved_ptr, 3, row, rows, inside)
    top_u = _saved(saved_ptr, 2, row_other, rows, exists)
    log_total_u = _saved(saved_ptr, 3, row_other, rows, exists)
    total = tl.full((ROWS, 1), 1, DTYPE)
    if TEACHER:
        source, source_exists = _inverse(inverse_ptr, partner_ptr, sample, inside, samples, REVERSED)
        w_source = tl.load(w_ptr + source * w_stride, mask=inside, other=0.0)[:, None]
        row_source = source * sites + site
        top_s_source = _saved(saved_ptr, 0, row_source, rows, source_exists)
        log_total_s_source = _saved(saved_ptr, 1, row_source, rows, source_exists)
        if not REVERSED:
            top_t_source = _saved(saved_ptr, 2, row_source, rows, source_exists)
            log_total_t_source = _saved(saved_ptr, 3, row_source, rows, source_exists)
        own_mean = _saved(saved_ptr, 4, row, rows, inside)
        partner_mean = _saved(saved_ptr, 5, row_source, rows, source_exists)
    walks: tl.constexpr = 2 if ELEMENTWISE else 1  # with a gradient for each term, the sums must be computed first
    if ELEMENTWISE:
        total = tl.zeros((ROWS, 1), DTYPE)
        if TEACHER:
            own_mean = tl.zeros((ROWS, 1), DTYPE)
            partner_mean = tl.zeros((ROWS, 1), DTYPE)
    else:
        factor *= tl.load(g_ptr)
    for walk in tl.static_range(walks):
        for start in range(0, classes, CLASSES):
            c = start + tl.arange(0, CLASSES)
            s = _load(s_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
            t = _load(t_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
            t_other = _load(t_ptr, other, site, exists, c, classes, sites, CLASSES_LAST, DTYPE)
            p, log_p = _normalize(s, top_s, log_total_s, inverse_temperature)
            q, _ = _normalize(t, top_t, log_total_t, inverse_temperature)
            u, _ = _normalize(t_other, top_u, log_total_u, inverse_temperature)
            label = w * q + (1 - w) * u
            if ELEMENTWISE:
                g = _load(g_ptr, sample, site, inside, c, classes, sites, CLASSES_LAST, DTYPE)
            else:
                g = tl.full((ROWS, CLASSES), 1, DTYPE)
            if STUDENT:
                if walk == walks - 1:
                    ds = _student_gradient(p, label, g, total)
                    _store(ds_ptr, ds * factor, sample, site, inside, c, classes, sites, CLASSES_LAST)
                else:
                    total += tl.sum(_times(label, g), 1, keep_dims=True)
            if TEACHER:
                h = _log_ratio(label, p, log_p)
                s = _load(s_ptr, source, site, source_exists, c, classes, sites, CLASSES_LAST, DTYPE)
                p, log_p = _normalize(s, top_s_source, log_total_s_source, inverse_temperature)
                if not REVERSED:
                    t_source = _load(t_ptr, source, site, source_exists, c, classes, sites, CLASSES_LAST, DTYPE)
                    u, _ = _normalize(t_source, top_t_source, log_total_t_source, inverse_temperature)
                label = w_source * u + (1 - w_source) * q
                h_source = _log_ratio(label, p, log_p)
                if ELEMENTWISE:
                    h = g * (h + 1)
                    g = _load(g_ptr, source, site, source_exists, c, classes, sites, CLASSES_LAST, DTYPE)
                    h_source = g * (h_source + 1)
                if walk == walks - 1:
                    dt = w * _times(q, h - own_mean) + (1 - w_source) * _times(q, h_source - partner_mean)
                    _store(dt_ptr, dt * factor, sample, site, inside, c, classes, sites, CLASSES_LAST)
                else:
                    own_mean += tl.sum(_times(q, h), 1, keep_dims=True)
                    partner_mean += tl.sum(_times(q, h_source), 1, keep_dims=True)


def _launch(
    student: Tensor, coefficient: Tensor, partner: Tensor | None, shares: Shares
) -> tuple[int, dict[str, object]]:
    """The number of programs, and the arguments that forward and backward kernels share."""
    samples, classes, sites = student.shape
    resident = classes <= RESIDENT_CLASSES
    columns = max(16, triton.next_power_of_2(classes)) if resident else CHUNK
    rows = max(1, shares.program // columns)
    settings = {
        "samples": samples,
        "classes": classes,
        "sites": sites,
        "w_stride": coefficient.stride(0) if coefficient.ndim else 0,
        "REVERSED": partner is None,
        "CLASSES_LAST": student.stride(1) == 1,
        "DTYPE": compute_type(student),
        "ROWS": rows,
        "CLASSES": columns,
        "num_warps": max(1, rows * columns // (shares.thread * warp_size())),
    }
    return triton.cdiv(samples * sites, rows), settings


def forward(
    loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    mixing_coefficient: Tensor,
    partner: Tensor | None,
    temperature: float,
    scale: float,
    saved: Tensor,
) -> None:
    """Fills the loss: see :class:`dfad_kernels.registration.Kernels`."""
    programs, settings = _launch(student, mixing_coefficient, partner, FORWARD)
    settings |= {"temperature": temperature, "scale": scale, "ELEMENTWISE": loss.ndim > 0}
    out = loss if loss.ndim else loss.new_empty(programs)
    if saved.numel():
        _interpolated_kl_forward_chunked_kernel[(programs,)](
            out, saved, student, teacher, mixing_coefficient, partner, **settings
        )
    else:
        _interpolated_kl_forward_kernel[(programs,)](out, student, teacher, mixing_coefficient, partner, **settings)
    if not loss.ndim:
        torch.sum(out, 0, out=loss)


def backward(
    student_gradient: Tensor | None,
    teacher_gradient: Tensor | None,
    loss_gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    mixing_coefficient: Tensor,
    partner: Tensor | None,
    temperature: float,
    scale: float,
    saved: Tensor,
) -> None:
    """Fills the gradients: see :class:`dfad_kernels.registration.Kernels`."""
    shares = BACKWARD_NARROW if student.itemsize == 2 else BACKWARD
    programs, settings = _launch(student, mixing_coefficient, partner, shares)
    settings |= {
        "temperature": temperature,
        "scale": scale,
        "STUDENT": student_gradient is not None,
        "TEACHER": teacher_gradient is not None,
        "ELEMENTWISE": loss_gradient.ndim > 0,
    }
    # sorting inverts a permutation without waiting for the device, and its indices are valid for any partner
    inverse = None if partner is None or teacher_gradient is None else partner.argsort(stable=True)
    gradients = (student_gradient, teacher_gradient, loss_gradient)
    inputs = (student, teacher, mixing_coefficient, partner, inverse)
    if saved.numel():
        _interpolated_kl_backward_chunked_kernel[(programs,)](*gradients, saved, *inputs, **settings)
    else:
        _interpolated_kl_backward_kernel[(programs,)](*gradients, *inputs, **settings)
