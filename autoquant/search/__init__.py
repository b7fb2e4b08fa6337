"""From sensitivities to one confirmed assignment."""
