"""`Pieces`: where the parts of a tensor are that its file holds cut up, as HDF5 holds what it compresses."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """A grid of pieces over a matrix as it lies in the file; a vector is one row."""

    shape: tuple[int, int]
    piece_shape: tuple[int, int]
    itemsize: int
    places: tuple[tuple[int, int, int], ...]
    """Row by row of pieces: first byte in the file, bytes there, and which filters were left out (a bit each)."""
    filters: tuple[int, ...]
    """HDF5's numbers, in the order in which they were applied."""

    @property
    def across(self) -> int:
        """Pieces side by side."""
        return -(-self.shape[1] // self.piece_shape[1])
