"""A judge that returns NaN for a token of the first reply of every batch, with this folder on PYTHONPATH."""

import importlib.util
import math
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

BACKBONE = "unified_rl.backbones.janus"


class NanJudge(MetaPathFinder):
    """Changes the backbone's class once its module is loaded; nothing in the package knows of it."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """The usual spec, with a loader that breaks the module behind it."""
        if name != BACKBONE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_break(module: ModuleType) -> None:
            load(module)
            right = module.JanusBackbone.text_logps

            def text_logps(*arguments: object, **options: object) -> object:
                score = right(*arguments, **options)
                score.log_probs[0, 0] = math.nan
                return score

            module.JanusBackbone.text_logps = text_logps

        spec.loader.exec_module = load_and_break
        return spec


sys.meta_path.insert(0, NanJudge())
