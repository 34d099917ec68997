"""Where rows without clients come from: tables, Hugging Face data sets, image folders, digits."""
