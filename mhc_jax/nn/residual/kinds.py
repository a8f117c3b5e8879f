"""Which part `model.residual` names, and the one way to add another from outside. What is known of a kind without its code is in
`mhc_jax.residual_kinds`."""

from mhc_jax.nn.residual.hc import HC, StaticHC
from mhc_jax.nn.residual.kromhc import KromHC
from mhc_jax.nn.residual.mhc import MHC, IdentityHC
from mhc_jax.nn.residual.mhc_lite import MHCLite
from mhc_jax.nn.residual.socket import Connection, PlainResidual
from mhc_jax.residual_kinds import KINDS, ResidualKind

CONNECTIONS: dict[str, type[Connection]] = {
    "residual": PlainResidual,
    "hc": HC,
    "static_hc": StaticHC,
    "mhc": MHC,
    "identity_hc": IdentityHC,
    "mhc_lite": MHCLite,
    "kromhc": KromHC,
}


def register(name: str, part: type[Connection], kind: ResidualKind) -> None:
    """Makes `name` a residual kind of this process: configs, run lists and command lines then take it as they take the library's own.

    Call it before a config names it, once in every process (docs/add_a_residual_part.md).

    Raises:
      ValueError: the name is no identifier, or is another part's. A part is not replaced, because what has been compiled with it stays.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot name a residual kind; use letters, digits and underscores")
    if CONNECTIONS.get(name, part) is not part:
        raise ValueError(f"{name!r} is the residual kind of {CONNECTIONS[name].__name__} already; choose another name")
    CONNECTIONS[name], KINDS[name] = part, kind
