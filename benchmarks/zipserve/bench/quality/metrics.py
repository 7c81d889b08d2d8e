"""How far a codec's answers are from the exact ones, per window and over windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Exact:
    """What the model itself says to the scored tokens of one window."""

    log_probs: torch.Tensor
    """float32 [scored, vocab]"""
    targets: torch.Tensor
    """int64 [scored]: what really follows."""
    answers: tuple[slice, ...]
    """Rows that are answers to queries."""
    matched: float
    """Share of the queries whose answer is right in all of its tokens; NaN without queries."""

    @classmethod
    def of(cls, logits: torch.Tensor, targets: Sequence[int], answers: tuple[slice, ...] = ()) -> "Exact":
        """From the logits [scored, vocab] of an exact forward pass."""
        wanted = torch.tensor(targets, device=logits.device)
        return cls(logits.float().log_softmax(-1), wanted, answers, _matched(logits, wanted, answers))


@dataclass(frozen=True)
class Score:
    """One codec on one window."""

    kl: float
    """Mean KL(exact ‖ codec) of the next token's distribution, in nats per token."""
    nll_change: float
    """Mean change of the real next token's negative log-likelihood, in nats."""
    top1: float
    """Share of tokens where both find the same token most likely."""
    match_change: float
    """Change of the share of queries whose answer is right; NaN without queries."""
    greedy: float = math.nan
    """Share of the generated tokens before the first that differs; NaN where none were generated."""


def score(logits: torch.Tensor, exact: Exact) -> Score:
    """Compares a codec's logits [scored, vocab] with the exact ones."""
    found = logits.float().log_softmax(-1)
    rows = torch.arange(len(found), device=found.device)
    probs = exact.log_probs.exp()
    # A token that is ruled out has -inf on both sides; it adds nothing.
    kl = torch.where(probs > 0, probs * (exact.log_probs - found), 0.0).sum(-1)
    change = exact.log_probs[rows, exact.targets] - found[rows, exact.targets]
    same = found.argmax(-1) == exact.log_probs.argmax(-1)
    matched = _matched(found, exact.targets, exact.answers)
    return Score(kl.mean().item(), change.mean().item(), same.float().mean().item(), matched - exact.matched)


def agreement(expected: Sequence[int], found: Sequence[int]) -> float:
    """Share of the expected tokens before the first that differs."""
    pairs = zip(expected, found, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected)) / len(expected)


@dataclass(frozen=True)
class Estimate:
    """A mean over windows with its standard error, which is NaN for a single window."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f}" if math.isnan(self.error) else f"{self.value:.4f} ±{self.error:.4f}"


def mean(values: Sequence[float]) -> Estimate:
    """Over windows; NaN without any."""
    if not values:
        return Estimate(math.nan, math.nan)
    center = math.fsum(values) / len(values)
    return Estimate(center, _error([value - center for value in values]))


def perplexity_ratio(nll_changes: Sequence[float]) -> Estimate:
    """exp of the mean change: the codec's perplexity over the exact one."""
    change = mean(nll_changes)
    ratio = math.exp(change.value)
    return Estimate(ratio, ratio * change.error)


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Ratio of the means of two measurements of the same windows, whose common ups and downs cancel in its error."""
    if not values or math.fsum(base) == 0:
        return Estimate(math.nan, math.nan)
    quotient = math.fsum(values) / math.fsum(base)
    residuals = [value - quotient * of_base for value, of_base in zip(values, base, strict=True)]
    return Estimate(quotient, _error(residuals) * len(base) / abs(math.fsum(base)))


def _error(residuals: Sequence[float]) -> float:
    count = len(residuals)
    return math.sqrt(math.fsum(value * value for value in residuals) / (count * (count - 1))) if count > 1 else math.nan


def _matched(logits: torch.Tensor, targets: torch.Tensor, answers: Sequence[slice]) -> float:
    if not answers:
        return math.nan
    right = logits.argmax(-1) == targets
    return sum(bool(right[rows].all()) for rows in answers) / len(answers)
