"""Let influence decide the data mixture: train on what helps, measured while training.

    DataInfCalculator        gradients of sources and probes -> how much each source helps the probes
    MixtureWeightCalculator  scores -> weights of the sources
    InfluenceAwareOptimizer  a torch optimizer that does both every so many steps
    MixedDataset             draws items of the sources by the weights, also while workers run

The library knows torch and numpy, and nothing of the model beyond its linear layers.
"""

from cheapertraining.datainf import DataInfCalculator, DrawBatches, Probe, SourceScores
from cheapertraining.dataset import MixedDataset, Source, StreamSource
from cheapertraining.errors import CheaperTrainingError
from cheapertraining.mixture import MixtureUpdate, MixtureWeightCalculator, project_to_bounds
from cheapertraining.optimizer import InfluenceAwareOptimizer, InfluenceReport
from cheapertraining.projection import GradientProjector, PerSampleLoss
from cheapertraining.scores import Score, benefits

__all__ = [
    "CheaperTrainingError",
    "DataInfCalculator",
    "DrawBatches",
    "GradientProjector",
    "InfluenceAwareOptimizer",
    "InfluenceReport",
    "MixedDataset",
    "MixtureUpdate",
    "MixtureWeightCalculator",
    "PerSampleLoss",
    "Probe",
    "Score",
    "Source",
    "SourceScores",
    "StreamSource",
    "benefits",
    "project_to_bounds",
]
