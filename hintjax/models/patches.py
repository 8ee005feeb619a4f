"""Images as tokens: patches, class tokens and registers, with learned positions."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message


class PatchEmbedding(nn.Module):
    """Patches as tokens, after the class tokens and the registers.

    Its layer `patches` is the map of the patches, before positions are added.

    Args:
        patch: side of a patch, in pixels.
        width: channels of a token.
        init: initializer of tokens and positions.
        class_tokens: number of class tokens, which come first.
        registers: number of register tokens, which have no positions.
        positions: whether the class tokens and the patches have learned positions.
    """

    patch: int
    width: int
    init: nn.initializers.Initializer
    class_tokens: int = 1
    registers: int = 0
    positions: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch n width"]:
        """Returns the class tokens, the registers and the tokens of the patches."""
        sides = (self.patch, self.patch)
        patches = nn.Conv(self.width, sides, sides, "VALID", name="patches")
        x = patches(x)
        x = x.reshape(*x.shape[:-3], -1, self.width)
        if self.class_tokens:
            tokens = self._tokens("tokens", self.class_tokens, x)
            x = jnp.concatenate([tokens, x], axis=-2)
        if self.positions:
            x = x + self.param("positions", self.init, x.shape[-2:])
        if self.registers:
            first, rest = jnp.split(x, [self.class_tokens], axis=-2)
            registers = self._tokens("registers", self.registers, x)
            x = jnp.concatenate([first, registers, rest], axis=-2)
        return x

    def _tokens(self, name: str, n: int, x: Array) -> Array:
        """Learned tokens, for every image of a batch."""
        tokens = self.param(name, self.init, (n, self.width)).astype(x.dtype)
        return jnp.broadcast_to(tokens, (*x.shape[:-2], n, self.width))


def check_sides(model: str, x: Float[Array, "*batch h w channels"], patch: int) -> None:
    """Raises unless the sides of images are multiples of the patch.

    Args:
        model: name of the model that is named in the error.
        x: the images.
        patch: side of a patch, in pixels.

    Raises:
        Refusal: if a side is 0 or no multiple of the patch.
    """
    if any(side % patch or not side for side in x.shape[-3:-1]):
        wanted = f"images whose sides are multiples of the patch, {patch}"
        got = f"{x.shape[-3]}x{x.shape[-2]}"
        near = max(1, round(x.shape[-3] / patch)) * patch
        do = f"Resize the images, for example to {near}x{near}, or change the patch."
        raise Refusal(message(model, wanted, got, do))
