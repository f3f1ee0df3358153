"""The memory behind the blocks: its layout, its owner on a GPU, its zeroing."""
