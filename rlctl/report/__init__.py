"""From finished runs to statements about algorithms."""
