"""The fused plan: decoders of the llama family as one native call between two attentions.

It is built from a loaded module by recognition: which parts its layers have, and what these parts do to random numbers.
Whatever is not recognized keeps its module on the generic path; whatever is recognized wrongly shows in the load-time
probe.
"""

from zipserve.engine.fused.model import FusedModel
from zipserve.engine.fused.recognition import Decoder, NotRecognizedError, recognize

__all__ = ["Decoder", "FusedModel", "NotRecognizedError", "recognize"]
