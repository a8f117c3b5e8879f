"""Tables on disk: without padding, so that another number of devices reads them; another size is refused."""

import jax
import numpy as np
import pytest
from etils import epath
from table_cases import HEAD_DIM, NUM_ROWS, batch, on, placed, placed_table

from mhc_jax.errors import UserError
from mhc_jax.parallel.rules import Rules
from mhc_jax.tables.layout import padded_rows, table_shards
from mhc_jax.tables.lookup import collect
from mhc_jax.tables.optimizers import row_adam
from mhc_jax.tables.sinkhorn import sinkhorn_momentum
from mhc_jax.train import arrays
from mhc_jax.train.fingerprint import fingerprints

MESHES = [(2, 4), (2, 1), None, (1, 3), (1, 7), (8, 1)]


def tree(optimizer, num_rows=NUM_ROWS, head_dim=HEAD_DIM):
    """A table, the state of its optimizer and something that is no table; and where each lies under the mesh that is set."""
    table = placed_table(num_rows, head_dim)
    state = [placed(leaf, *("table_rows", None)[: leaf.ndim]) for leaf in jax.tree.leaves(optimizer.init(table))]
    return {"table": table, "state": state, "scale": placed(np.float32(3.0))}


def table_rows(tree, num_rows=NUM_ROWS):
    return {"table": num_rows} | {f"state.{i}": num_rows for i, leaf in enumerate(tree["state"]) if leaf.ndim}


def save(folder, tree, num_rows=NUM_ROWS):
    arrays.write(folder, arrays.to_host(tree, table_rows(tree, num_rows)), describe=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [pytest.param(row_adam, marks=pytest.mark.slow), lambda: sinkhorn_momentum(NUM_ROWS)])
def test_a_table_goes_from_mesh_to_mesh(tmp_path, make):
    """8 -> 2 -> 1 -> 3 -> 7 -> 8 devices; the rows, the moments and their fingerprints stay, and padding is zero."""
    optimizer, rows_and_values, wanted = make(), batch(), None
    for step, mesh in enumerate(MESHES):
        with on(mesh):
            like = tree(optimizer)
            if wanted is None:
                gradients, _ = collect(*(placed(x, "batch") for x in rows_and_values), num_rows=NUM_ROWS)
                state = jax.tree.unflatten(jax.tree.structure(optimizer.partition()), like["state"])
                table, state = optimizer.update(gradients, state, like["table"], 0.1)
                now = like | {"table": table, "state": jax.tree.leaves(state)}
                prints, wanted = fingerprints(now), [np.asarray(leaf)[:NUM_ROWS] if leaf.ndim else leaf for leaf in jax.tree.leaves(now)]
            else:
                now = arrays.read(epath.Path(tmp_path / str(step - 1)), like, table_rows(like))
            assert fingerprints(now) == prints
            for leaf, expected, other in zip(jax.tree.leaves(now), wanted, jax.tree.leaves(like)):
                np.testing.assert_array_equal(np.asarray(leaf)[:NUM_ROWS] if leaf.ndim else leaf, expected)
                assert leaf.shape == other.shape
                assert not leaf.ndim or not np.asarray(leaf)[NUM_ROWS:].any()
                assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
            assert now["table"].shape[0] == padded_rows(NUM_ROWS, table_shards(Rules()))
            save(epath.Path(tmp_path / str(step)), now)


def test_a_shard_of_padding_alone_is_neither_written_nor_read(tmp_path):
    """Nine rows on eight devices: blocks of two, of which the last three hold no row."""
    folder = epath.Path(tmp_path)
    with on((8, 1)):
        like = tree(row_adam(), 9)
        save(folder, like, 9)
        assert len(list((folder / "table").glob("[0-9]*"))) == 5
        again = arrays.read(folder, like, table_rows(like, 9))
    np.testing.assert_array_equal(again["table"], like["table"])


@pytest.mark.parametrize(("rows", "dim", "said"), [(337, HEAD_DIM, r"\[337, 6\]"), (NUM_ROWS, 8, r"\[331, 8\]")])
def test_a_table_of_another_size_is_refused(tmp_path, rows, dim, said):
    """Also one that has the same size with its padding: 331 and 336 rows are both 336 on eight devices."""
    folder = epath.Path(tmp_path)
    with on((2, 4)):
        save(folder, tree(row_adam()))
        other = tree(row_adam(), rows, dim)
        with pytest.raises(UserError, match=rf"the table state.1 of the checkpoint is \[331, 6\], but the run's is {said}.*a new run"):
            arrays.read(folder, other, table_rows(other, rows))
        close = tree(row_adam(), 336)
        assert close["table"].shape == placed_table().shape
        with pytest.raises(UserError, match=r"is \[331, 6\], but the run's is \[336, 6\]"):
            arrays.read(folder, close, table_rows(close, 336))
