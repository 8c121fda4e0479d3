"""Names of models: a client's `model` in, the mixture that answers out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dlp_lora.policy import Mixture
from dlp_lora.serve.errors import APIError, invalid
from dlp_lora.serve.schema import MAX_WEIGHT

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of a request; if `mixture` is None, the router chooses. `asked` is echoed, `label` is for metrics."""

    asked: str
    label: str
    mixture: Mixture | None


@dataclass(frozen=True)
class ModelNames:
    """The model names of a server; `served` is the name of the routed model."""

    served: str

    @property
    def base(self) -> str:
        """The name of the base model."""
        return f"{self.served}:{BASE}"

    def listed(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """All names of one word, the routed model first."""
        return (self.served, self.base, *adapters)

    def check_free(self, adapter: str) -> None:
        """Checks that an adapter may have a name.

        Raises:
            APIError: if it is equal to another model's name, or has forbidden characters.
        """
        if adapter == self.served or adapter.startswith(f"{self.served}:"):
            raise invalid(f"an adapter cannot be named {adapter!r}: {self.served} is the routed model", "lora_name")

    def choose(self, asked: str | None, adapters: Collection[str]) -> Choice:
        """Finds the choice for a name among the adapters.

        Raises:
            APIError: if there is no model of this name, or the mixture is wrong.
        """
        if asked is None or asked == self.served:
            return Choice(asked=self.served, label=self.served, mixture=None)
        if asked == self.base:
            return Choice(asked=asked, label=self.base, mixture=Mixture())
        name = asked if asked in adapters else asked.removeprefix(f"{self.served}:")
        if name in adapters:
            return Choice(asked=asked, label=name, mixture=Mixture({name: 1.0}))
        if "=" in asked:
            return Choice(asked=asked, label="mixture", mixture=self._mixture(asked, adapters))
        raise self.unknown(asked, adapters)

    def unknown(self, asked: str, adapters: Collection[str]) -> APIError:
        """The error for an unknown name."""
        listed = self.listed(sorted(adapters))
        some = ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")
        return APIError(
            404,
            f"The model {asked[:200]!r} does not exist. There are {some}; and mixtures, as in "
            f'"{(listed[2:] or ("math",))[0]}=0.6".',
            type="not_found_error",
            param="model",
            code="model_not_found",
        )

    def _mixture(self, asked: str, adapters: Collection[str]) -> Mixture:
        weights: dict[str, float] = {}
        for part in asked.split(","):
            name, _, weight = (text.strip() for text in part.partition("="))
            if name not in adapters:
                raise self.unknown(name, adapters)
            if name in weights:
                raise invalid(f"model: {name!r} is in the mixture twice", "model")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise invalid(f'model: {part!r} is not NAME=WEIGHT, as in "math=0.6,units=0.4"', "model") from None
        if any(abs(weight) > MAX_WEIGHT for weight in weights.values()):
            raise invalid(f"model: a weight must be at most {MAX_WEIGHT}", "model")
        try:
            return Mixture(weights)
        except ValueError as error:
            raise invalid(f"model: {error}", "model") from None
