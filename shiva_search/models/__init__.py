"""What --model accepts, and how each block family carries its tokens."""
