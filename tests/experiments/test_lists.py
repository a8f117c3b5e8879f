"""The named run lists are sound, and the command line finds them."""

import jax
import pytest

from mhc_jax.cli import main
from mhc_jax.config import difference
from mhc_jax.configs import CONFIGS, get
from mhc_jax.experiments.engram_allocation import budget
from mhc_jax.experiments.figures_memory import expert_share
from mhc_jax.experiments.lists import RUN_LISTS
from mhc_jax.nn.count import count_parameters
from mhc_jax.nn.decoder import Decoder


@pytest.mark.parametrize("name", RUN_LISTS)
def test_a_named_list_has_the_name_it_goes_by_and_no_configs(name):
    runs = RUN_LISTS[name]()
    assert runs.name == name
    assert name not in CONFIGS  # `ablate NAME` could mean either


def test_every_run_of_the_depth_search_is_depth30_with_few_fields_changed():
    common = {"name", "train.steps", "train.checkpoint_every"}
    for run in RUN_LISTS["depth30_search"]().runs:
        changed = set(difference(get("depth30"), run.config)) - common - {"model.residual"}
        assert changed <= {"optimizer.learning_rate", "model.num_layers", "model.attention.qk_norm"}
        assert len(changed) <= 2


def test_runs_of_the_allocation_sweep_have_equal_budgets():
    """Sparse and active parameters within 1 % of the control's; the control without made-up parameters has fewer, and says so."""
    runs = RUN_LISTS["engram_allocation"]()
    control = count_parameters(runs.first(runs.baseline).config.model)
    shares = []
    for variant in runs.variants:
        config = runs.first(variant).config
        count = count_parameters(config.model)
        if variant == "rho 1, not made up":
            assert control.total - count.total == pytest.approx(budget().projections, rel=2e-2)
            continue
        assert count.total == pytest.approx(control.total, rel=0.01)
        assert count.active == pytest.approx(control.active, rel=0.01)
        assert float(variant.removeprefix("rho ")) == pytest.approx(expert_share(config), abs=0.01)
        shares.append(expert_share(config))
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    with_memory = runs.first("rho 0.5").config.model
    model = jax.eval_shape(lambda: Decoder(with_memory, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model.engram)) == budget().projections


def test_a_named_list_takes_no_config_fields(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", "depth30_search", "--steps", "3"])
    assert "--steps" in capsys.readouterr().err
