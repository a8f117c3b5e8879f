"""The wheel works where there is no checkout, and puts no generic names into site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"mhc_jax", "pallas_kernels"}
    for path in ("configs/laptop.py", "experiments/report.py", "experiments/chinchilla_figure_4.csv", "py.typed"):
        assert f"mhc_jax/{path}" in names
    assert "pallas_kernels/py.typed" in names

    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)
    # Isolated from the checkout: started elsewhere, with the wheel first on the path.
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import mhc_jax; assert mhc_jax.__file__.startswith({str(site)!r}); "
        "from mhc_jax.cli import main; from mhc_jax.experiments.ablation import ablation; from mhc_jax import configs; "
        "ablation(configs.get('27b')); sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "laptop" in done.stdout
