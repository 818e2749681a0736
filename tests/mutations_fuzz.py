"""Wrong changes to how files are read that a disk, or somebody hostile, may have written; `mutations.py` runs them.
The fields are `Mutation`'s."""

from __future__ import annotations

PUBLISHED, PRIVATE, ASKED = (f"fuzz/test_fuzz_{name}.py::test_" for name in ("published", "state", "asked"))
READABLE = PUBLISHED + "a_manifest_that_can_be_read_can_be_deleted_from[few]"
MANIFEST = PUBLISHED + "a_manifest[few]"
RECORDS = PRIVATE + "records_with_odd_values_stop_no_deletion[few]"
DATABASE = PRIVATE + "a_database_with_odd_values[few]"
BEGUN = PRIVATE + "a_begun_deletion[few]"
REQUEST = ASKED + "a_request[few]"

FUZZ = (
    (3, "a card that cannot be told stalls a deletion", "store/card.py",
     (("    except Exception as error:\n        logger.error(\"the model card", "    except KeyError as error:\n"
       "        logger.error(\"the model card"),),
     (READABLE,)),
    (3, "half a character is read, and stalls the deletion that writes it again", "plain_data.py",
     (("            json.dumps(value, ensure_ascii=False).encode()\n", "            pass\n"),), (READABLE, MANIFEST)),
    (3, "JSON that is nested without end ends in an error without a name", "plain_data.py",
     (("    except RecursionError:\n", "    except ZeroDivisionError:\n"),), (MANIFEST, BEGUN)),
    (3, "a pipe in a file's place is waited for", "files.py",
     (("    if not stat.S_ISREG(mode):", "    if stat.S_ISDIR(mode):"),),
     (PUBLISHED + "something_in_the_place_of_a_file_that_is_none[few]",)),
    (3, "a field of another type is read", "plain_data.py",
     (("    raise ValueError(f\"`{name}` is {value!r:.80}\")", "    return value"),),
     (PRIVATE + "a_receipt[few]", PRIVATE + "a_purge_report[few]", RECORDS)),
    (3, "a record of an export with odd values stalls a deletion", "store/export_records.py",
     (("        record = read_as(cls, data)\n", "        record = cls(**data)\n"),), (RECORDS,)),
    (3, "a receipt with odd values is read", "store/receipts.py",
     (("            return read_as(cls, {\"format\": 1, **data})\n", "            return cls(**data)\n"),),
     (PRIVATE + "a_receipt[few]",)),
    (3, "a damaged receipt beside the state stalls every deletion", "store/receipts.py",
     (("        except StoreError as error:\n            logger.error(",
       "        except OSError as error:\n            logger.error("),),
     (PRIVATE + "a_receipt_beside_the_state[few]",)),
    (3, "tables that somebody changed are believed", "store/schema.py",
     (("    if found != known:", "    if False:"),),
     (PRIVATE + "a_statement_that_somebody_hid_in_the_tables_is_told",)),
    (3, "a row whose values are of other kinds is believed", "store/schema.py",
     (("        connection.row_factory = _checked\n", ""),), (DATABASE,)),
    (3, "a number that no database can hold is read", "store/manifest.py",
     (("not 0 <= value < 1 << 63:", "not 0 <= value:"),), (BEGUN,)),
    (3, "a begun deletion that names nobody by a digest is carried out", "store/deletion_records.py",
     (("            raise ValueError(\"it names an example by what is no keyed digest\")", "            pass"),),
     (BEGUN,)),
    (3, "a record of a stage with odd values is read", "store/record_tables.py",
     (("    if odd or absent:\n", "    if False:\n"),), (RECORDS,)),
    (3, "a damaged block of activations stops who reads it", "store/activation_blocks.py",
     (("RuntimeError, struct.error, *MALFORMED)", "RuntimeError, struct.error)"),),
     (PRIVATE + "a_block_of_activations[few]",)),
    (12, "half a character in a request is a fault of the server", "endpoint/protocol.py",
     (("            json.dumps(given, ensure_ascii=False).encode()\n", "            pass\n"),), (REQUEST,)),
    (12, "a body that cannot be read is refused in another form", "endpoint/app.py",
     (("    @app.exception_handler(400)\n", "    @app.exception_handler(418)\n"),), (REQUEST,)),
    (3, "a key with half a character ends in an error without a name", "store/folder.py",
     (("            key = encoded(text, \"The partition key\")\n", "            key = text.encode()\n"),),
     (ASKED + "a_partition_key[few]",)),
    (3, "a small plan of many long prefixes fills the memory", "plan/tree.py",
     (("        if size > MAX_PREFIXES:\n", "        if False:\n"),),
     (PUBLISHED + "a_plan_that_would_fill_the_memory_is_refused",)),
    (3, "what is no list is asked for as one", "store/requests.py",
     (("Mapping) or not isinstance(value, Iterable):", "Mapping):"),), (ASKED + "what_is_asked_for_in_python[few]",)),
    (3, "a dataset of other things than rows is a fault of the program", "cli/options.py",
     (("row.get(column) if isinstance(row, Mapping) else None", "row.get(column)"),),
     (ASKED + "a_dataset_that_lacks_some[few]",)),
)
