"""What people read of a run: tables, and numbers for TensorBoard."""
