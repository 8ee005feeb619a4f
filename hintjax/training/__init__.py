"""The training loop: batches through phases, with reports, checkpoints and resume."""

from hintjax.training.arrays import fingerprint
from hintjax.training.checkpoints import Checkpoints, open_checkpoints
from hintjax.training.evaluation import evaluate
from hintjax.training.feeds import Feed, Program, on_device, program, streamed
from hintjax.training.ledger import Fitted
from hintjax.training.loop import NothingLearned, fit
from hintjax.training.metrics import open_metrics, read_metrics
from hintjax.training.phase import Phase
from hintjax.training.progress import progress
from hintjax.training.sealed import DamageError
from hintjax.training.trees import load_tree, save_tree

__all__ = [
    "Checkpoints",
    "DamageError",
    "Feed",
    "Fitted",
    "NothingLearned",
    "Phase",
    "Program",
    "evaluate",
    "fingerprint",
    "fit",
    "load_tree",
    "on_device",
    "open_checkpoints",
    "open_metrics",
    "program",
    "progress",
    "read_metrics",
    "save_tree",
    "streamed",
]
