"""The science of an experiment: pure torch, without files, sockets, clock or global random state."""

from fedsweep.fl.aggregate import fed_avg, fed_median
from fedsweep.fl.evaluate import evaluate_model
from fedsweep.fl.models import LogisticRegression, ScalableCNN
from fedsweep.fl.partition import partition_data_dirichlet
from fedsweep.fl.reference import get_client_dataloader, train_client
from fedsweep.fl.stopping import EarlyStopping

__all__ = [
    "EarlyStopping",
    "LogisticRegression",
    "ScalableCNN",
    "evaluate_model",
    "fed_avg",
    "fed_median",
    "get_client_dataloader",
    "partition_data_dirichlet",
    "train_client",
]
