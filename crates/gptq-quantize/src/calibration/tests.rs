//! Whole files through [`CalibrationSet::load`], with the tokenizer of 256 bytes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use gptq_testkit::{Rng, tiny_llama};
use proptest::prelude::*;

use super::*;

const VOCAB: usize = 256;

struct Bench {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        tiny_llama(folder.path(), 0);
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        Self { folder, tokenizer }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn load(
        &self,
        path: &Path,
        nsamples: usize,
        seqlen: usize,
    ) -> Result<CalibrationSet, CalibrationError> {
        self.load_all(&[path], &CalibrationOptions { nsamples, seqlen, seed: 7 })
    }

    fn load_all(
        &self,
        paths: &[&Path],
        options: &CalibrationOptions,
    ) -> Result<CalibrationSet, CalibrationError> {
        self.load_as(paths, Windows::Cuts, options)
    }

    fn load_as(
        &self,
        paths: &[&Path],
        kind: Windows,
        options: &CalibrationOptions,
    ) -> Result<CalibrationSet, CalibrationError> {
        let sources: Result<Vec<_>, _> = paths.iter().map(CalibrationSource::file).collect();
        CalibrationSet::load(&sources?, &self.tokenizer, VOCAB, kind, options)
    }

    /// All tokens of a file, as one window.
    fn tokens(&self, path: &Path) -> Vec<u32> {
        let length = match self.load(path, 1, usize::MAX >> 8).unwrap_err() {
            CalibrationError::TooShort { tokens, .. } => tokens,
            other => panic!("{other}"),
        };
        self.load(path, 1, length).unwrap().windows.remove(0)
    }

    fn text(&self, path: &Path) -> String {
        self.tokenizer.decode(&self.tokens(path), false).unwrap()
    }

    fn message(&self, path: &Path) -> String {
        self.load(path, 1, 4).unwrap_err().to_string()
    }
}

#[test]
fn a_text_file_is_one_document() {
    let bench = Bench::new();
    let text = "The quick brown fox.\n\nJumps über the lazy dog.\n".repeat(50);
    let path = bench.file("a.txt", &text);
    assert_eq!(bench.text(&path), text);
    let set = bench.load(&path, 6, 100).unwrap();
    assert_eq!(set.windows.len(), 6);
    assert!(set.windows.iter().all(|window| window.len() == 100));
    let source = &set.report.sources[0];
    assert_eq!(
        (source.name.as_str(), source.kind.as_str(), source.documents),
        ("a.txt", "text", 1)
    );
    assert_eq!((source.characters as usize, source.tokens), (text.chars().count(), text.len()));
    assert_eq!((set.report.windows, set.report.seqlen, set.report.tokens), (6, 100, 600));
    assert_eq!(set.report.note, None);
    assert!(source.coverage > 0.0 && set.report.vocabulary_coverage > 0.0);
}

#[test]
fn rows_of_text_are_joined_by_an_empty_line() {
    let bench = Bench::new();
    let path = bench.file("a.jsonl", "\u{feff}{\"text\": \"one\"}\n\n{\"text\": \"zwei\\n\", \"messages\": [{\"content\": []}]}\r\n{\"text\": \"\"}\n{\"text\":\"end\"}");
    assert_eq!(bench.text(&path), "one\n\nzwei\n\n\n\n\nend");
    assert_eq!(bench.load(&path, 1, 4).unwrap().report.sources[0].documents, 4);
}

#[test]
fn chats_go_through_the_template_and_ids_as_they_are() {
    let bench = Bench::new();
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Yo\"}]}\n";
    let path = bench.file(
        "a.jsonl",
        format!("{chat}{chat}{{\"input_ids\": [0, 1, 2]}}\n{{\"text\": \"x\"}}\n"),
    );
    assert_eq!(bench.text(&path), format!("{0}{0}!\"#x", "user: Hi\nassistant: Yo\n"));
}

#[test]
fn a_seed_gives_the_same_windows_everywhere() {
    let bench = Bench::new();
    let text: String = (0..5000u32).map(|i| char::from(b'a' + (i * i % 26) as u8)).collect();
    let path = bench.file("a.txt", text);
    let options = CalibrationOptions { nsamples: 8, seqlen: 64, seed: 1 };
    let set = bench.load_all(&[&path], &options).unwrap();
    assert_eq!(set, bench.load_all(&[&path], &options).unwrap());
    // Fixed for all platforms and versions: a changed value means that old runs cannot be repeated.
    assert_eq!(set.report.fingerprint, FINGERPRINT);
    let other = bench.load_all(&[&path], &CalibrationOptions { seed: 2, ..options }).unwrap();
    assert_ne!(set.windows, other.windows);
}

const FINGERPRINT: &str = "641fc3b14606bad9";

#[test]
fn several_sources_share_the_windows() {
    let bench = Bench::new();
    let (a, b) = (bench.file("a.txt", "a".repeat(500)), bench.file("b.txt", "b".repeat(500)));
    let set = bench
        .load_all(&[&a, &b], &CalibrationOptions { nsamples: 5, seqlen: 10, seed: 0 })
        .unwrap();
    let firsts: Vec<u32> = set.windows.iter().map(|window| window[0]).collect();
    assert_eq!(firsts, [64, 64, 64, 65, 65]);
    assert_eq!(set.report.sources.iter().map(|source| source.windows).collect::<Vec<_>>(), [3, 2]);
}

#[test]
fn weights_decide_how_many_windows_a_source_gives() {
    let bench = Bench::new();
    let paths = [bench.file("a.txt", "a".repeat(500)), bench.file("b.txt", "b".repeat(500))];
    let options = CalibrationOptions { nsamples: 10, seqlen: 10, seed: 0 };
    let load = |weights: [f64; 2]| {
        let sources = paths.iter().zip(weights);
        let sources: Vec<_> =
            sources.map(|(p, w)| CalibrationSource::file(p).unwrap().with_weight(w)).collect();
        CalibrationSet::load(&sources, &bench.tokenizer, VOCAB, Windows::Cuts, &options)
    };
    let set = load([3.0, 7.0]).unwrap();
    let firsts: Vec<u32> = set.windows.iter().map(|window| window[0]).collect();
    assert_eq!(firsts, [[64; 3].as_slice(), &[65; 7]].concat());
    let told: Vec<_> = set.report.sources.iter().map(|s| (s.weight, s.windows)).collect();
    assert_eq!(told, [(3.0, 3), (7.0, 7)]);
    // Scale does not matter, equal weights are the default.
    assert_eq!(load([0.3, 0.7]).unwrap().windows, set.windows);
    let paths = [paths[0].as_path(), &paths[1]];
    assert_eq!(
        load([2.0, 2.0]).unwrap().windows,
        bench.load_all(&paths, &options).unwrap().windows
    );
    let message = load([1.0, 0.01]).unwrap_err().to_string();
    assert!(message.contains("b.txt") && message.contains("--nsamples"), "{message}");
}

#[test]
fn sets_follow_each_other() {
    let bench = Bench::new();
    let (a, b) = (bench.file("a.txt", "a".repeat(50)), bench.file("b.txt", "b".repeat(50)));
    let options = CalibrationOptions { nsamples: 2, seqlen: 10, seed: 0 };
    let one = |path| bench.load_all(&[path], &options).unwrap();
    let both = one(&a).followed_by(one(&b), VOCAB);
    assert_eq!(both.windows.len(), 4);
    assert_eq!((both.report.windows, both.report.tokens), (4, 40));
    assert_eq!((both.report.distinct_tokens, both.report.sources.len()), (2, 2));
    assert_ne!(both.report.fingerprint, one(&a).report.fingerprint);
}

#[test]
fn little_text_is_noted_and_too_little_refused() {
    let bench = Bench::new();
    let path = bench.file("a.txt", "x".repeat(250));
    let set = bench.load(&path, 8, 100).unwrap();
    assert_eq!(set.windows.len(), 8);
    assert_eq!(
        set.report.note.as_deref(),
        Some(
            "a.txt holds 250 tokens, 2 windows of 100 without overlap: the 8 windows drawn overlap"
        )
    );
    assert_eq!(bench.load(&path, 2, 250).unwrap().windows.len(), 2);
    let message = bench.load(&path, 8, 251).unwrap_err().to_string();
    assert!(
        message
            .contains("holds 250 tokens, less than one window of 251 (8 windows were asked for)"),
        "{message}"
    );
    assert!(message.contains("--seqlen"), "{message}");
}

#[test]
fn of_long_files_the_beginning_is_read() {
    let bench = Bench::new();
    let rows = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(30_000)).repeat(12);
    let path = bench.file("a.jsonl", rows);
    let tokenizer = &bench.tokenizer;
    let source = CalibrationSource::file(&path).unwrap();
    let mut collector = Collector::new(&path, tokenizer, VOCAB, 100_000, None);
    source.read(&mut collector).unwrap();
    let (documents, report) = collector.finish(source.kind()).unwrap();
    let tokens = documents.tokens.len();
    assert!(report.cut && (100_000..800_000).contains(&tokens), "{report:?}");
}

#[test]
fn records_stay_apart_and_are_cut_with_their_special_tokens() {
    let bench = Bench::new();
    let text = bench.file("a.txt", "\u{feff}One line.\r\n\n  \nA rather longer line.\nEnd");
    let rows = "{\"text\": \"two\\nlines\"}\n{\"input_ids\": [5, 6, 7, 8]}\n{\"text\": \"\"}\n";
    let rows = bench.file("b.jsonl", rows);
    let records = |paths: &[&Path], nsamples, seqlen| {
        let options = CalibrationOptions { nsamples, seqlen, seed: 3 };
        bench.load_as(paths, Windows::Records, &options).unwrap()
    };
    let tokens = |text: &str, longest| bench.tokenizer.encode_truncated(text, longest).unwrap();
    let set = records(&[&text, &rows], 64, 12);
    let expected = [
        tokens("One line.", 12),
        tokens("A rather longer line.", 12),
        tokens("End", 12),
        tokens("two\nlines", 12),
        vec![5, 6, 7, 8],
    ];
    assert_eq!(set.windows, expected);
    assert_eq!((expected[0].len(), expected[1].len()), (9, 12));
    let [text_report, rows_report] = set.report.sources.as_slice() else { panic!() };
    assert_eq!((text_report.documents, text_report.windows), (3, 3));
    assert_eq!((rows_report.documents, rows_report.windows), (2, 2));
    assert_eq!((set.report.windows, text_report.coverage), (5, 1.0));
    assert_eq!(set.report.note, None);
    let few = records(&[&text], 2, 3);
    assert_eq!(few.windows.len(), 2);
    assert!(few.windows.iter().all(|window| window.len() == 3));
    let empty = bench.file("c.txt", "\n \n");
    let options = CalibrationOptions { nsamples: 1, seqlen: 8, seed: 0 };
    let error = bench.load_as(&[&empty], Windows::Records, &options).unwrap_err();
    assert!(error.to_string().contains("c.txt"), "{error}");
}

#[test]
fn every_malformation_is_named() {
    let bench = Bench::new();
    for (name, content, expected) in [
        (
            "cut.jsonl",
            &b"{\"text\": \"abcdef\"}\n{\"text\": \"abc"[..],
            "line 2: not a valid object: EOF while parsing a string",
        ),
        ("type.jsonl", b"{\"text\": 7}", "line 1: not a valid object: invalid type: integer `7`"),
        (
            "turn.jsonl",
            b"\n{\"messages\": [{\"role\": \"user\"}]}",
            "line 2: not a valid object: missing field `content`",
        ),
        (
            "keys.jsonl",
            b"{\"prompt\": \"x\"}",
            "line 1: none of the keys `text`, `messages`, `input_ids`",
        ),
        ("array.jsonl", b"[{\"text\": \"x\"}]", "line 1: a JSON array"),
        ("prose.jsonl", b"Once upon a time", "line 1: not a valid object"),
        ("deep.jsonl", "{".repeat(100_000).as_bytes(), "line 1: not a valid object"),
        (
            "vocab.jsonl",
            b"{\"input_ids\": [3, 256]}",
            "line 1: token 256 is outside the model's vocabulary of 256",
        ),
        ("minus.jsonl", b"{\"input_ids\": [-1]}", "token -1 is outside"),
        ("float.jsonl", b"{\"input_ids\": [1e99]}", "line 1: not a valid object"),
        (
            "bytes.jsonl",
            b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}",
            "not UTF-8: bad byte at offset 24",
        ),
        ("bytes.txt", b"abc\xc3(", "not UTF-8: bad byte at offset 3"),
        ("half.txt", b"abc\xe2\x82", "not UTF-8: bad byte at offset 3"),
        ("empty.txt", b"", "holds 0 tokens"),
        ("empty.jsonl", b"\n\n", "holds 0 tokens"),
        ("empty.parquet", b"", "cannot be read as Parquet"),
        ("short.parquet", b"PAR1PAR1", "cannot be read as Parquet"),
        ("noise.parquet", b"PAR1\xff\xff\xff\xff\xff\xff\xff\x7fPAR1", "cannot be read as Parquet"),
    ] {
        let path = bench.file(name, content);
        let message = bench.message(&path);
        assert!(message.contains(expected) && message.contains(name), "{name}: {message}");
    }
    let absent = bench.folder.path().join("absent.txt");
    assert!(bench.message(&absent).contains("absent.txt"));
    let folder = bench.folder.path().join("folder.jsonl");
    std::fs::create_dir(&folder).unwrap();
    assert!(bench.message(&folder).contains("cannot read"));
    let path = bench.file("a.txt", "some text");
    for (nsamples, seqlen) in [(0, 4), (4, 0)] {
        assert!(
            bench
                .load(&path, nsamples, seqlen)
                .unwrap_err()
                .to_string()
                .starts_with("nothing to draw")
        );
    }
}

#[test]
fn a_line_without_end_is_refused() {
    let bench = Bench::new();
    let path = bench.file("a.jsonl", vec![b' '; (64 << 20) + 2]);
    assert!(bench.message(&path).contains("line 1: longer than 64 MiB"));
}

/// Rows of a column under test; definition and repetition levels are those of the schema beside it.
fn parquet_file(schema: &str, columns: Vec<Column>) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer =
        SerializedFileWriter::new(Vec::new(), schema, Arc::new(WriterProperties::default()))
            .unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in columns {
        let mut to = group.next_column().unwrap().unwrap();
        match column {
            Column::Strings(values, definitions, repetitions) => {
                let values: Vec<ByteArray> = values.into_iter().map(ByteArray::from).collect();
                to.typed::<ByteArrayType>()
                    .write_batch(&values, levels(&definitions), levels(&repetitions))
                    .unwrap();
            }
            Column::Integers(values, definitions, repetitions) => {
                to.typed::<Int64Type>()
                    .write_batch(&values, levels(&definitions), levels(&repetitions))
                    .unwrap();
            }
        }
        to.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

/// No levels are those of required, unrepeated columns.
fn levels(levels: &[i16]) -> Option<&[i16]> {
    (!levels.is_empty()).then_some(levels)
}

enum Column {
    Strings(Vec<&'static str>, Vec<i16>, Vec<i16>),
    Integers(Vec<i64>, Vec<i16>, Vec<i16>),
}

fn parquet_text() -> Vec<u8> {
    let schema = "message m { optional int64 id; optional binary text (STRING); }";
    let ids = Column::Integers(vec![1, 2, 3], vec![1, 1, 1], vec![]);
    parquet_file(schema, vec![ids, Column::Strings(vec!["one", "three"], vec![1, 0, 1], vec![])])
}

fn parquet_chats() -> Vec<u8> {
    // Two rows: a chat of two messages and an empty one, as pyarrow lays them out.
    let schema = "message m { optional group messages (LIST) { repeated group list { optional group element {
        optional binary content (STRING); optional binary role (STRING); } } } }";
    let levels = || (vec![4, 4, 1], vec![0, 1, 0]);
    let column = |values: Vec<&'static str>| Column::Strings(values, levels().0, levels().1);
    parquet_file(schema, vec![column(vec!["Hi", "Yo"]), column(vec!["user", "assistant"])])
}

/// One chat of so many messages with the same content, which the file holds once.
fn parquet_repeated(content: &'static str, messages: usize) -> Vec<u8> {
    let schema = "message m { optional group messages (LIST) { repeated group list { optional group element {
        optional binary content (STRING); optional binary role (STRING); } } } }";
    let repetitions = || (0..messages).map(|index| i16::from(index > 0)).collect();
    let column = |value| Column::Strings(vec![value; messages], vec![4; messages], repetitions());
    parquet_file(schema, vec![column(content), column("user")])
}

fn parquet_ids(last: i64) -> Vec<u8> {
    let schema = "message m { required group input_ids (LIST) { repeated group list { required int64 element; } } }";
    parquet_file(
        schema,
        vec![Column::Integers(vec![5, 6, last], vec![1, 1, 0, 1], vec![0, 1, 0, 0])],
    )
}

#[test]
fn parquet_columns_are_read() {
    let bench = Bench::new();
    assert_eq!(bench.text(&bench.file("a.parquet", parquet_text())), "one\n\nthree");
    assert_eq!(bench.text(&bench.file("b.bin", parquet_chats())), "user: Hi\nassistant: Yo\n");
    assert_eq!(bench.tokens(&bench.file("c.parquet", parquet_ids(7))), [5, 6, 7]);
    let long: &'static str = Box::leak("x".repeat(1 << 19).into_boxed_str());
    let message = bench.message(&bench.file("long.parquet", parquet_repeated(long, 129)));
    assert!(message.contains("row 1: longer than 64 MiB"), "{message}");
    let message = bench.message(&bench.file("d.parquet", parquet_ids(256)));
    assert!(message.contains("row 3: token 256 is outside"), "{message}");
    let other = parquet_file(
        "message m { required binary body (STRING); }",
        vec![Column::Strings(vec!["x"], vec![], vec![])],
    );
    assert!(bench.message(&bench.file("e.parquet", other)).contains("no column `text`"));
}

#[test]
fn broken_parquet_is_an_error_and_no_panic() {
    let bench = Bench::new();
    let mut rng = Rng::new(11);
    for (name, whole) in
        [("text", parquet_text()), ("chats", parquet_chats()), ("ids", parquet_ids(7))]
    {
        for round in 0..400 {
            let mut bytes = whole.clone();
            if round % 4 == 0 {
                bytes.truncate(rng.below(bytes.len()));
            } else {
                for _ in 0..=rng.below(3) {
                    let at = rng.below(bytes.len());
                    bytes[at] = rng.u64() as u8;
                }
            }
            // Damaged values may still be a valid file; what counts is that it comes back.
            let _ = bench.load(&bench.file(&format!("{name}.parquet"), bytes), 1, 1);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_lines_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bench = Bench::new();
        let _ = bench.load(&bench.file("a.jsonl", &bytes), 2, 3);
        let _ = bench.load(&bench.file("a.unknown", &bytes), 2, 3);
    }

    #[test]
    fn lines_like_objects_do_not_make_it_panic(
        lines in proptest::collection::vec("\\{\"(text|messages|input_ids)\": ?(\"[a-z\\\\\"]{0,9}\"|\\[[0-9,\\-]{0,9}\\]|[0-9]{1,30}|null)\\}?", 0..6)
    ) {
        let bench = Bench::new();
        match bench.load(&bench.file("a.jsonl", lines.join("\n")), 2, 3) {
            Ok(set) => prop_assert!(set.windows.iter().flatten().all(|&token| (token as usize) < VOCAB)),
            Err(error) => prop_assert!(error.to_string().contains("a.jsonl")),
        }
    }
}
