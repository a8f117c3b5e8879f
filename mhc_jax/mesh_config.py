"""What a config says of the mesh that a run is spread over, and whether everything that is split comes out even."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_jax.errors import UserError
from mhc_jax.sparse_config import PAGE

if TYPE_CHECKING:
    from mhc_jax.config import Config

CONV_REACH = 9  # tokens; of `pallas_kernels.engram_gate`, which a config does not import


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used. See docs/parallel.md."""

    data: int = 1  # batch
    fsdp: int = 1  # batch and parameters
    expert: int = 1  # batch and experts
    context: int = 1  # positions of a sequence; in dense attention, heads
    tensor: int = 1  # heads, hidden widths and vocabulary; between sublayers, positions; and experts

    @property
    def devices(self) -> int:
        return self.batch_parts * self.context * self.tensor

    @property
    def batch_parts(self) -> int:
        """In how many parts the sequences of a batch are split."""
        return self.data * self.fsdp * self.expert


def check_mesh(config: "Config") -> None:
    """Everything that is split over a mesh axis must come out even.

    Raises:
      UserError: names the two numbers that do not go together.
    """
    m, a, mesh = config.model, config.model.attention, config.mesh
    for path, sequences in (
        ("train.batch_size / train.microbatches", config.train.batch_size // config.train.microbatches),
        ("train.eval_sequences", config.train.eval_sequences),
    ):
        divides("mesh.data x mesh.fsdp x mesh.expert", mesh.batch_parts, path, sequences)
    divides("mesh.fsdp", mesh.fsdp, "model.dim", m.dim)
    across = mesh.context * mesh.tensor
    divides("mesh.context x mesh.tensor", across, "data.seq_len", config.data.seq_len)
    divides("mesh.context x mesh.tensor", across, "model.attention.num_heads", a.num_heads)
    divides("mesh.tensor", mesh.tensor, "model.vocab_size", m.vocab_size)
    if m.dense_layers:
        divides("mesh.tensor", mesh.tensor, "model.dense_dim", m.dense_dim)
    if m.dense_layers < m.num_layers:
        divides("mesh.expert x mesh.tensor", mesh.expert * mesh.tensor, "model.moe.num_experts", m.moe.num_experts)
        divides("mesh.fsdp", mesh.fsdp, "model.moe.expert_dim", m.moe.expert_dim)
        divides("mesh.tensor", mesh.tensor, "model.moe.shared_experts x expert_dim", m.moe.shared_experts * m.moe.expert_dim)
    if a.sparse is not None:
        divides("mesh.tensor", mesh.tensor, "model.attention.sparse.index_heads", a.sparse.index_heads)
        if a.sparse.granularity == "page":
            divides("mesh.context x 64 (a page)", mesh.context * PAGE, "data.seq_len", config.data.seq_len)
    own = config.data.seq_len // across
    if m.engram is not None and m.engram.conv and across > 1 and own < CONV_REACH:
        raise UserError(
            f"mesh.context x mesh.tensor is {across}, which leaves {own} tokens of a sequence on a device; Engram's convolution "
            f"reaches {CONV_REACH} back, so lower them or raise data.seq_len"
        )


def divides(path: str, part: int, whole_path: str, whole: int) -> None:
    """Raises UserError unless the part divides the whole."""
    if whole % part:
        raise UserError(f"{path} is {part}, which does not divide {whole_path} = {whole}; change one of the two")
