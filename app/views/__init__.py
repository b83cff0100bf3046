"""The dashboard's pages, a module each: `page` draws it. Streamlit would take a folder called pages for its own."""
