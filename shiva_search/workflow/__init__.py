"""The commands: each reads files, calls the stages, writes files. In: settings or a run's folder. Out: an Answer.

A run's folder (reports/<run>/) holds all that later commands need; run.json says how the run was made.
"""

from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.compare import compare_command
from shiva_search.workflow.listing import devices_command, models_command
from shiva_search.workflow.optimize import optimize_command
from shiva_search.workflow.profiles import profile_command
from shiva_search.workflow.run_commands import generate_command, measure_command, report_command, train_command
from shiva_search.workflow.settings import Settings
from shiva_search.workflow.worker import worker_command

__all__ = [
    "Answer",
    "Progress",
    "Settings",
    "compare_command",
    "devices_command",
    "generate_command",
    "measure_command",
    "models_command",
    "optimize_command",
    "profile_command",
    "report_command",
    "train_command",
    "worker_command",
]
