"""The fit finds the law that made the points."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import scaling


def test_the_fit_finds_a_law_again() -> None:
    theta = np.array([np.log(300.0), np.log(4e3), 0.4, np.log(2e4), 0.6])
    points = [
        (n, s, float(scaling.predict(theta, n, s))) for n in (8e4, 4e5, 2e6) for s in (1280, 2560, 3840, 5120, 6400)
    ]
    found = scaling.fit(points)
    assert np.exp(found[0]) == pytest.approx(300, rel=0.05)
    assert found[2] == pytest.approx(0.4, abs=0.05) and found[4] == pytest.approx(0.6, abs=0.05)
    assert scaling.predict(found, 1e8, 1e6) == pytest.approx(scaling.predict(theta, 1e8, 1e6), rel=0.05)


def test_networks_grow_and_differ_in_nothing_else() -> None:
    weights, flops = zip(*(scaling.sizes(name) for name in scaling.NETWORKS), strict=True)
    assert list(weights) == sorted(weights) and list(flops) == sorted(flops) and weights[2] > 5 * weights[0]


def test_too_few_studies_are_refused(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([str(tmp_path), "--studies", "10,20,30"]) == 2
    assert "the largest needs as many" in capsys.readouterr().err
