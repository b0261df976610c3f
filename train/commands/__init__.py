"""The commands beside training: status, doctor, theory."""
