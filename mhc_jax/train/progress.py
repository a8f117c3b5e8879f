"""What a person sees while a run goes on: a progress bar on a terminal, a line per evaluation elsewhere."""

from collections import deque
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from mhc_jax.config import Config


class Progress:
    """Loss, tokens per second and time left. A context manager."""

    def __init__(self, config: Config, first_step: int, console: Console | None = None):
        self._config = config
        self._console = console or Console()
        self._recent: deque[float] = deque(maxlen=20)  # seconds a step
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tok/s  {task.fields[left]} left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            config.model.residual, total=config.train.steps, completed=first_step, loss=float("nan"), speed=0.0, left="?"
        )

    def stepped(self, step: int, loss: float, seconds: float) -> None:
        """After each step."""
        self._recent.append(seconds)
        self._bar.update(self._task, completed=step, loss=loss, speed=self._speed(), left=self._left(step))

    def evaluated(self, step: int, loss: float) -> None:
        """After each evaluation."""
        speed = f", {self._speed():,.0f} tok/s, {self._left(step)} left" if self._recent else ""
        self._console.print(f"step {step}/{self._config.train.steps}: held-out loss {loss:.4f}{speed}", highlight=False)

    def _speed(self) -> float:
        return self._config.tokens_per_step * len(self._recent) / sum(self._recent)

    def _left(self, step: int) -> str:
        seconds = (self._config.train.steps - step) * sum(self._recent) / len(self._recent)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d}"

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
