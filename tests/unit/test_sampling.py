"""Sampling: noise that is a function of its key alone, and the nucleus."""

import math

import pytest

torch = pytest.importorskip("torch")

from teams_hpc.llm.sampling import _noise, next_tokens  # noqa: E402

KEYS = [(2**63 - 1 - seed, position) for seed in range(40) for position in range(25)]


def test_noise_is_gumbel_and_uncorrelated() -> None:
    noise = _noise(KEYS, 1000, torch.device("cpu"))
    assert noise.isfinite().all()
    uniform = (-(-noise).exp()).exp()
    for share in (0.001, 0.01, 0.5, 0.99, 0.999):
        sigma = math.sqrt(share * (1 - share) / noise.numel())
        assert (uniform <= share).float().mean().item() == pytest.approx(share, abs=5 * sigma)
    for table in (noise[:200], noise.T[:200]):
        off_diagonal = torch.corrcoef(table) - torch.eye(len(table))
        assert off_diagonal.abs().max().item() < 0.17


def test_noise_of_a_row_does_not_depend_on_the_others() -> None:
    together = _noise(KEYS[:50], 300, torch.device("cpu"))
    for row, key in enumerate(KEYS[:50]):
        assert torch.equal(together[row], _noise([key], 300, torch.device("cpu"))[0])


def test_tokens_outside_the_nucleus_are_never_drawn() -> None:
    shares = torch.tensor([0.05, 0.5, 0.3, 0.15])
    logits = shares.log().repeat(len(KEYS), 1)
    drawn = next_tokens(logits, KEYS, temperature=1.0, top_p=0.7)
    counts = torch.bincount(drawn, minlength=4).tolist()
    assert counts[0] == counts[3] == 0
    assert counts[1] / len(KEYS) == pytest.approx(0.5 / 0.8, abs=0.07)
    only = next_tokens(logits, KEYS, temperature=1.0, top_p=1e-9)
    assert (only == 1).all()
    assert (next_tokens(logits, KEYS, temperature=0.0, top_p=0.7) == 1).all()


def test_the_only_likely_token_is_drawn_whatever_its_noise() -> None:
    key, size, token = (171, 0), 1 << 19, 352_368  # here the uniform number rounds to 1
    assert _noise([key], size, torch.device("cpu")).isfinite().all()
    logits = torch.zeros(1, size)
    logits[0, token] = 100.0
    for top_p in (0.9, 1.0):
        assert next_tokens(logits, [key], temperature=1.0, top_p=top_p).item() == token


@pytest.mark.parametrize("size", [5, 64, 100, 1024])
@pytest.mark.parametrize("peak", [0.0, 4.0, 12.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_a_nucleus_found_in_the_likeliest_tokens_is_that_of_all(
    size: int, peak: float, top_p: float
) -> None:
    """Whole numbers as logits, so that many are as likely as others."""
    torch.manual_seed(0)
    keys = KEYS[:200]
    rows = torch.arange(len(keys))
    logits = (2.0 * torch.randn(len(keys), size)).round()
    logits[rows, torch.randint(size, (len(keys),))] += peak
    ordered = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    last = (before < top_p).sum(-1).clamp(min=1) - 1
    lowest = logits[rows, ordered.indices[rows, last]]
    noisy = logits + _noise(keys, size, torch.device("cpu"))
    expected = noisy.masked_fill(logits < lowest[:, None], float("-inf")).argmax(-1)
    drawn = next_tokens(logits, keys, temperature=1.0, top_p=top_p)
    assert torch.equal(drawn, expected)
