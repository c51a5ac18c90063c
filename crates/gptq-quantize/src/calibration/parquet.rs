//! Parquet files with a column `text`, `messages` (list of structs with `role` and `content`) or
//! `input_ids` (list of integers); the first of the three that is there counts.
//!
//! Leaf columns are read directly and put together from their definition and repetition levels,
//! because the crate's row reader asserts on schemas that it does not expect.

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use gptq_format::chat::Message;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::CalibrationError;
use super::collect::Collector;

pub(super) fn read(file: File, collector: &mut Collector<'_>) -> Result<(), CalibrationError> {
    let path = collector.path();
    // The parquet crate answers most malformed files with an error, but asserts on some (negative
    // offsets, a missing dictionary). After a panic nothing of the collector is used any more.
    std::panic::catch_unwind(AssertUnwindSafe(|| read_groups(file, collector))).unwrap_or_else(
        |_| Err(malformed(path, "its metadata or pages contradict themselves".to_owned())),
    )
}

fn read_groups(file: File, collector: &mut Collector<'_>) -> Result<(), CalibrationError> {
    let path = collector.path();
    let bad = |error: ParquetError| malformed(path, error.to_string());
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let columns = Columns::find(schema).ok_or_else(|| malformed(path, NO_COLUMN.to_owned()))?;
    let mut rows_before = 0;
    for index in 0..reader.num_row_groups() {
        let group = reader.get_row_group(index).map_err(bad)?;
        let open = |leaf: usize| Leaf::open(&*group, schema, leaf).map_err(bad);
        let mut leaves = columns.leaves().into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        loop {
            let batch =
                leaves.iter_mut().map(Leaf::next).collect::<Result<Vec<_>, _>>().map_err(bad)?;
            let rows = batch.iter().map(Vec::len).min().unwrap_or(0);
            if batch.iter().any(|column| column.len() != rows) {
                return Err(malformed(
                    path,
                    "its columns have different numbers of rows".to_owned(),
                ));
            }
            if rows == 0 {
                break;
            }
            let mut batch: Vec<_> = batch.into_iter().map(Vec::into_iter).collect();
            for row in rows_before + 1..=rows_before + rows {
                if collector.is_full() {
                    collector.cut();
                    return Ok(());
                }
                let cells = batch.iter_mut().filter_map(Iterator::next).collect();
                columns.feed(cells, row, collector)?;
            }
            rows_before += rows;
        }
    }
    Ok(())
}

/// The leaf columns that are read, as indices into the schema.
enum Columns {
    Text(usize),
    Messages { role: usize, content: usize },
    Ids(usize),
}

impl Columns {
    fn find(schema: &SchemaDescriptor) -> Option<Self> {
        let leaf = |first: &str, last: &str, repeated: i16| {
            schema.columns().iter().position(|column| {
                let path = column.path().parts();
                path.first().is_some_and(|name| name == first)
                    && (last.is_empty() || path.last().is_some_and(|name| name == last))
                    && column.max_rep_level() == repeated
            })
        };
        if let Some(text) = leaf("text", "text", 0) {
            return Some(Self::Text(text));
        }
        if let (Some(role), Some(content)) =
            (leaf("messages", "role", 1), leaf("messages", "content", 1))
        {
            return Some(Self::Messages { role, content });
        }
        leaf("input_ids", "", 1).map(Self::Ids)
    }

    fn leaves(&self) -> Vec<usize> {
        match *self {
            Self::Text(text) => vec![text],
            Self::Messages { role, content } => vec![role, content],
            Self::Ids(ids) => vec![ids],
        }
    }

    /// Gives row `row` (from 1), one list of cells per leaf, to the collector.
    fn feed(
        &self,
        leaves: Vec<Vec<Cell>>,
        row: usize,
        collector: &mut Collector<'_>,
    ) -> Result<(), CalibrationError> {
        let path = collector.path();
        let place = || format!("row {row}");
        let bad = |reason: &str| CalibrationError::Row {
            path: path.to_owned(),
            place: place(),
            reason: reason.to_owned(),
        };
        let text = |cell: Cell| match cell {
            Cell::Bytes(bytes) => std::str::from_utf8(bytes.data())
                .map(str::to_owned)
                .map_err(|_| bad("a string that is not UTF-8")),
            Cell::Int(_) => Err(bad("a number where a string was expected")),
        };
        if leaves.iter().flatten().map(Cell::bytes).sum::<usize>() > MAX_ROW_BYTES {
            return Err(bad(&format!("longer than {} MiB", MAX_ROW_BYTES >> 20)));
        }
        let mut leaves = leaves.into_iter();
        let mut cells = || leaves.next().unwrap_or_default();
        match self {
            // A null row has no cell.
            Self::Text(_) => {
                cells().into_iter().try_for_each(|cell| collector.text(text(cell)?, place))
            }
            Self::Messages { .. } => {
                let (roles, contents) = (cells(), cells());
                if roles.len() != contents.len() {
                    return Err(bad("a message without role or content"));
                }
                let message =
                    |(role, content)| Ok(Message { role: text(role)?, content: text(content)? });
                let messages =
                    roles.into_iter().zip(contents).map(message).collect::<Result<Vec<_>, _>>()?;
                if messages.is_empty() { Ok(()) } else { collector.chat(&messages, place) }
            }
            Self::Ids(_) => {
                let id = |cell| match cell {
                    Cell::Int(id) => Ok(id),
                    Cell::Bytes(_) => Err(bad("a string where a token id was expected")),
                };
                let ids = cells().into_iter().map(id).collect::<Result<Vec<_>, _>>()?;
                collector.ids(ids, place)
            }
        }
    }
}

/// A value that is not null. Strings are shared with the dictionary that many rows may take the same from.
enum Cell {
    Bytes(ByteArray),
    Int(i64),
}

impl Cell {
    fn bytes(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Int(_) => size_of::<i64>(),
        }
    }
}

/// One leaf column of one row group.
struct Leaf {
    reader: ColumnReader,
    max_definition: i16,
    repeated: bool,
}

impl Leaf {
    fn open(
        group: &dyn RowGroupReader,
        schema: &SchemaDescriptor,
        index: usize,
    ) -> Result<Self, ParquetError> {
        let column = schema.column(index);
        Ok(Self {
            reader: group.get_column_reader(index)?,
            max_definition: column.max_def_level(),
            repeated: column.max_rep_level() > 0,
        })
    }

    /// The next rows, at most [`BATCH_ROWS`]: the values of each, nulls left out. Empty at the end.
    fn next(&mut self) -> Result<Vec<Vec<Cell>>, ParquetError> {
        let (definition, repeated) = (self.max_definition, self.repeated);
        match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(reader) => {
                rows(reader, definition, repeated, Cell::Bytes)
            }
            ColumnReader::Int32ColumnReader(reader) => {
                rows(reader, definition, repeated, |value| Cell::Int(i64::from(value)))
            }
            ColumnReader::Int64ColumnReader(reader) => {
                rows(reader, definition, repeated, Cell::Int)
            }
            _ => Err(ParquetError::General(
                "a column is neither of strings nor of integers".to_owned(),
            )),
        }
    }
}

fn rows<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    max_definition: i16,
    repeated: bool,
    cell: impl Fn(T::T) -> Cell,
) -> Result<Vec<Vec<Cell>>, ParquetError> {
    let (mut definitions, mut repetitions, mut values) = (Vec::new(), Vec::new(), Vec::new());
    let (records, _, levels) = reader.read_records(
        BATCH_ROWS,
        Some(&mut definitions),
        Some(&mut repetitions),
        &mut values,
    )?;
    let mut rows: Vec<Vec<Cell>> = Vec::with_capacity(records);
    let mut values = values.into_iter();
    for level in 0..levels {
        // A repetition level of 0 begins a row; a definition level below the maximum is a null or
        // an empty list.
        let begins = !repeated || repetitions.get(level).is_none_or(|&repetition| repetition == 0);
        let present = definitions.get(level).is_none_or(|&definition| definition == max_definition);
        if begins {
            rows.push(Vec::new());
        }
        if present && let (Some(row), Some(value)) = (rows.last_mut(), values.next()) {
            row.push(cell(value));
        }
    }
    Ok(rows)
}

fn malformed(path: &Path, reason: String) -> CalibrationError {
    CalibrationError::Parquet { path: path.to_owned(), reason }
}

const NO_COLUMN: &str = "it has no column `text` (string), `messages` (list of structs with `role` and `content`) \
                         or `input_ids` (list of integers)";

/// Longest row accepted: a small file can hold a long string that one row lists many times.
const MAX_ROW_BYTES: usize = 64 << 20;

/// Rows decoded at once.
const BATCH_ROWS: usize = 64;
