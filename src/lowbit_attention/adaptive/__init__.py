"""Which recipe where: measured on the user's own model, chosen, kept as a file, applied and shown.

`observe` scores every attention call, `choose` takes one recipe for each, `Policy` keeps and applies them, and
`write_report` shows it all. ``docs/adaptive.md`` tells the whole way.
"""

from .choosing import Choice, choose, pareto
from .clock import CallKey
from .costs import CostTable, Rate, cost_table
from .fingerprint import Fingerprint
from .observing import Observer, observe
from .optimise import Option, Solution, frontier, minimise_time
from .policy import Policy, PolicyMismatchError, PolicyWarning
from .records import Observations, Record, Score
from .report import write_report
from .routing import Applied
from .scoring import Sample
from .sensitivity import Sensitivity, relative_l1, sensitivity
from .subjects import SUBJECTS, Subject, find_subject
from .tuning import tune

__all__ = [
    "SUBJECTS",
    "Applied",
    "CallKey",
    "Choice",
    "CostTable",
    "Fingerprint",
    "Observations",
    "Observer",
    "Option",
    "Policy",
    "PolicyMismatchError",
    "PolicyWarning",
    "Rate",
    "Record",
    "Sample",
    "Score",
    "Sensitivity",
    "Solution",
    "Subject",
    "choose",
    "cost_table",
    "find_subject",
    "frontier",
    "minimise_time",
    "observe",
    "pareto",
    "relative_l1",
    "sensitivity",
    "tune",
    "write_report",
]
