"""A torch.compile backend that makes weight gradients of linear layers from less than their inputs.

Steps take less time and less activation memory; the forward pass and all other gradients stay
exact.
"""

from pamm_compile._version import __version__
from pamm_compile.errors import (
    InvalidOptionError,
    MeasurementError,
    MethodError,
    NothingMatchedError,
    PammError,
    UnknownReportError,
    UnsupportedTorchError,
    UnsupportedTrainerError,
)
from pamm_compile.graph.vocabulary import register_attention
from pamm_compile.inspect.compare import Arm, Comparison, compare_memory
from pamm_compile.inspect.explain import explain
from pamm_compile.inspect.fidelity import Fidelity, SiteFidelity, fidelity
from pamm_compile.inspect.measure import MemoryUse, SavedStorage, measure_memory
from pamm_compile.inspect.predict import Prediction, predict_saved
from pamm_compile.inspect.recommend import Recommendation, recommend
from pamm_compile.methods import register_method
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.methods.quantized.method import Quantized
from pamm_compile.methods.remembered.method import GradientSubspace
from pamm_compile.methods.subspace.method import Subspace
from pamm_compile.report import GraphReport, Note, Report, SiteReport, State
from pamm_compile.sites.reasons import Reason
from pamm_compile.size import Cost, Size
from pamm_compile.torch_backend import Backend, backend, by_name
from pamm_compile.trials.result import Trial, TrialArm
from pamm_compile.trials.trial import trial
from pamm_compile.trials.verdict import Verdict, Worth

__all__ = [
    "Arm",
    "Backend",
    "Comparison",
    "Cost",
    "Fidelity",
    "GradientSubspace",
    "GraphReport",
    "InvalidOptionError",
    "MeasurementError",
    "MemoryUse",
    "Method",
    "MethodError",
    "Note",
    "NothingMatchedError",
    "Pamm",
    "PammError",
    "Prediction",
    "Quantized",
    "Reason",
    "Recommendation",
    "Report",
    "SavedStorage",
    "SiteFidelity",
    "SiteReport",
    "Size",
    "State",
    "Subspace",
    "Trial",
    "TrialArm",
    "UnknownReportError",
    "UnsupportedTorchError",
    "UnsupportedTrainerError",
    "Verdict",
    "Worth",
    "__version__",
    "backend",
    "by_name",
    "compare_memory",
    "explain",
    "fidelity",
    "measure_memory",
    "predict_saved",
    "recommend",
    "register_attention",
    "register_method",
    "trial",
]
