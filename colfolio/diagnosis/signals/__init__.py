"""Numbers measured of a model, its data and its training, without a trace in any of them."""

from colfolio.diagnosis.signals.data_facts import measure_data
from colfolio.diagnosis.signals.model_facts import measure_model
from colfolio.diagnosis.signals.probe import FirstVectors, Probe
from colfolio.diagnosis.signals.probe_batch import ProbeBatch, draw_probe

__all__ = [
    "FirstVectors",
    "Probe",
    "ProbeBatch",
    "draw_probe",
    "measure_data",
    "measure_model",
]
