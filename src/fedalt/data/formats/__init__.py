"""Files of rows: tables, image folders, a federation's own folder."""
