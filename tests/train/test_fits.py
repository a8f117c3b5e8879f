"""A run that cannot fit is refused at once; the bound is what one would count by hand."""

import jax
import pytest
from small import BASE

from mhc_jax.config import override
from mhc_jax.configs import CONFIGS
from mhc_jax.errors import UserError
from mhc_jax.nn.count import count_parameters
from mhc_jax.parallel.mesh import make_mesh
from mhc_jax.train import fits
from mhc_jax.train.loop import train


def test_the_largest_paper_model_is_refused_here_with_both_numbers_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "device_bytes", lambda device: 64 * 2**30)
    with pytest.raises(UserError, match=r"27b needs at least 5\d\d\.\d GiB .* which has 64\.0 GiB; raise mesh\.fsdp or mesh\.expert"):
        train(CONFIGS["27b"](), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_the_bound_counts_every_device_of_a_cpu_and_shares_parameters_over_fsdp_only(monkeypatch, data, fsdp):
    config = override(BASE, {"mesh.data": data, "mesh.fsdp": fsdp, "train.microbatches": 1})
    parameters = 16 * count_parameters(config.model).total * data  # one copy for every row of the mesh
    tokens = 8 * 16
    by_hand = parameters + tokens * 16 + tokens * 4 * 16 * 4
    assert fits.bytes_needed(config) * data * fsdp == pytest.approx(by_hand, abs=data * fsdp)
    mesh = make_mesh(config.mesh)
    monkeypatch.setattr(fits, "device_bytes", lambda device: by_hand)
    fits.check_fits(config, mesh)
    monkeypatch.setattr(fits, "device_bytes", lambda device: by_hand - 10 * data * fsdp)
    with pytest.raises(UserError, match=r"lower model\.num_layers"):
        fits.check_fits(config, mesh)


def test_where_memory_is_not_told_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(fits, "device_bytes", lambda device: None)
    fits.check_fits(CONFIGS["27b"](), make_mesh(BASE.mesh))


def test_this_machine_has_some_memory():
    assert 2**27 < fits.device_bytes(jax.devices("cpu")[0]) < 2**46
