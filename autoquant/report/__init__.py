"""What a run directory holds, as pictures, tables and one HTML file."""
