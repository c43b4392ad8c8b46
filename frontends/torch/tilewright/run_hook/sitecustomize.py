"""What Python imports at the start of a program under `tilewright run`.

The directory of this file is on the program's PYTHONPATH and holds nothing else. When the program
imports transformers, its `from_pretrained` is wrapped (tilewright/loading.py); a program that never
does is not touched, and neither torch nor tilewright is imported. What stands here must run on any
Python and must not raise: it is not the program's.

Tested by tests/python/test_run.py.
"""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_MODULE = "transformers.modeling_utils"


class _Finder:
    """Lets everything pass but one module, once."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                from tilewright import loading

                loading.install(module.PreTrainedModel)
            except Exception as error:
                sys.stderr.write(f"tilewright: models are not optimised: {error}\n")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_the_hidden_one(paths):
    """The sitecustomize that Python would have found without us."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]
sys.meta_path.insert(0, _Finder())
_run_the_hidden_one(sys.path)
