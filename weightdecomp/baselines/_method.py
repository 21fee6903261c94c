"""The one interface of all methods."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines._data import Data, OnStep


@runtime_checkable
class Method(Protocol):
    """A way to find units in a model: a frozen object of settings.

    The three questions that every method answers: `fit` finds the units on batches; `protocols.replaced_output` runs
    the target through what `fit` returned; its banks hold directions and activations, and `protocols.ablated_output`
    takes units out.
    """

    @property
    def name(self) -> str:
        """What the method is called in tables and in `methods=[...]`."""
        ...

    @property
    def setting(self) -> str:
        """Its settings in a few words."""
        ...

    def grid(self) -> Sequence["Method"]:
        """The same method over the stated grid that every comparison tunes it on."""
        ...

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Find units at the data's sites.

        Raises:
            Inapplicable: Where the method cannot be used, with the reason.
        """
        ...
