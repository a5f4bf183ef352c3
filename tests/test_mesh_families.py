"""Every family over two devices, against the same model on one."""

import numpy as np
import pytest

import coreinfer_jax as ci
from tests.support import check_same_core
from tests.test_families import CHOSEN, NEW, pair, prompt

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.mark.parametrize("family", CHOSEN)
def test_tokens_are_those_of_one_device(family: str) -> None:
    _, params = pair(family)
    spread, rows = ci.spread(params, ci.make_mesh(2)), [prompt(20), prompt(7)]
    for one, many in ((None, None), (ci.CoreConfig(shards=2), ci.CoreConfig())):
        alone = ci.generate(params, rows, one, max_new_tokens=NEW)
        shared = ci.generate(spread, rows, many, max_new_tokens=NEW)
        np.testing.assert_array_equal(alone.tokens, shared.tokens)
        if alone.core is not None:
            check_same_core(alone.core, shared.core)
