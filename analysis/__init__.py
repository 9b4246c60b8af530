"""What RoPE attention does between the observed distances: bounds, certificates, observability."""
