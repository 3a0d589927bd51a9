"""What a layer moves on a GPU, counted without one (benchmarks/kernels.py)."""

import pytest

from benchmarks import kernels


@pytest.mark.slow
def test_a_layer_moves_at_most_three_fifths_of_what_it_did() -> None:
    with kernels.norms_by_autocast():
        before = kernels.eager()
    plain, compiled = kernels.eager(), kernels.compiled()
    # The same products and attention whatever the norms do; compiled, q, k and v are one and gate and up are one.
    assert plain.kernels["products"] == before.kernels["products"] == 2 * 7 * 3
    assert compiled.kernels["products"] == 2 * 4 * 3
    assert compiled.bytes["attention"] == plain.bytes["attention"] == before.bytes["attention"]
    assert plain.other_bytes < 0.7 * before.other_bytes  # 68.3 %: norms
    assert compiled.other_bytes < 0.35 * before.other_bytes  # 33.5 %; the goal is 60
