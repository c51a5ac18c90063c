//! A directory to run the real binary in.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Map, Value};

use crate::{TinyLlama, safetensors_file};

/// Seed of the weights.
const SEED: u64 = 7;

/// A temporary directory with a tiny model (`model`) and a text (`text.txt`), where commands run.
#[derive(Debug)]
pub struct World {
    dir: tempfile::TempDir,
    binary: PathBuf,
    shape: TinyLlama,
    address_space: Option<u32>,
}

impl World {
    /// With the default [`TinyLlama`]. `binary` is what to run: `env!("CARGO_BIN_EXE_gptq")`.
    pub fn new(binary: &str) -> Self {
        Self::with_model(binary, TinyLlama::default())
    }

    /// With nothing in it.
    pub fn empty(binary: &str) -> Self {
        let dir =
            tempfile::tempdir().unwrap_or_else(|error| panic!("temporary directory: {error}"));
        let shape = TinyLlama::default();
        Self { dir, binary: binary.into(), shape, address_space: None }
    }

    /// With a model of this shape.
    pub fn with_model(binary: &str, shape: TinyLlama) -> Self {
        let world = Self { shape, ..Self::empty(binary) };
        world.shape.write(&world.path("model"), SEED);
        let words = (0..6000).map(|i| format!("word{} ", i * 7919 % 1009));
        world.write("text.txt", words.collect::<String>());
        world
    }

    /// Gives every run `kib` KiB of address space: enough for threads and mapped files, too little for what a file merely
    /// claims to hold.
    #[must_use]
    pub fn limited(self, kib: u32) -> Self {
        Self { address_space: Some(kib), ..self }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The path of `name` inside the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Reads a file.
    pub fn read(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Reads a JSON file.
    pub fn read_json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Changes the JSON object in a file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let mut value = self.read_json(name);
        change(value.as_object_mut().unwrap_or_else(|| panic!("{name} holds no object")));
        self.write(name, value.to_string());
    }

    /// Changes the header of a safetensors file.
    pub fn edit_header(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        self.write(name, safetensors_file::edited(&self.read(name), change));
    }

    /// Overwrites a tensor of the model, all of it or the first element.
    pub fn fill(&self, tensor: &str, value: f32, all: bool) {
        let mut bytes = self.read("model/model.safetensors");
        safetensors_file::fill(&mut bytes, tensor, value, all);
        self.write("model/model.safetensors", bytes);
    }

    /// Puts the pristine model back.
    pub fn restore(&self) {
        let model = self.path("model");
        std::fs::remove_dir_all(&model).unwrap_or_else(|error| panic!("model: {error}"));
        self.shape.write(&model, SEED);
    }

    /// The command `gptq` with `line` split at blanks, inside the directory and without a network.
    pub fn command(&self, line: &str) -> Command {
        let mut command = match self.address_space {
            None => Command::new(&self.binary),
            Some(kib) => {
                let mut shell = Command::new("sh");
                let limited = format!("ulimit -v {kib}; exec \"$0\" \"$@\"");
                shell.arg("-c").arg(limited).arg(&self.binary).args(["--threads", "2"]);
                shell
            }
        };
        command
            .args(line.split(' '))
            .current_dir(self.dir())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path("hub"))
            .env("RUST_BACKTRACE", "0")
            .env_remove("GPTQ_LOG");
        command
    }

    /// Runs a line.
    pub fn gptq(&self, line: &str) -> Output {
        self.command(line).output().unwrap_or_else(|error| panic!("gptq {line}: {error}"))
    }

    /// Stdout of a run that must succeed.
    pub fn ok(&self, line: &str) -> String {
        let output = self.gptq(line);
        assert!(output.status.success(), "gptq {line}: {}", self.text(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The JSON that a run writes, which must succeed.
    pub fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(line)).unwrap_or_else(|error| panic!("gptq {line}: {error}"))
    }

    /// Stderr of a run that must fail with exit code 1, one message, nothing on stdout, and every file as it was.
    pub fn fails(&self, line: &str) -> String {
        let before = self.files();
        let output = self.gptq(line);
        let stderr = self.text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "gptq {line}: {stderr}");
        assert!(output.stdout.is_empty(), "gptq {line} wrote to stdout");
        assert!(!stderr.contains("panicked"), "gptq {line}: {stderr}");
        assert_eq!(stderr.matches("error:").count(), 1, "gptq {line}: {stderr}");
        assert!(stderr.len() < 2000, "gptq {line}: a message of {} bytes", stderr.len());
        assert_eq!(self.files(), before, "gptq {line} left something behind");
        stderr
    }

    /// As [`World::fails`]; the message holds all `parts`.
    pub fn refuses(&self, line: &str, parts: &[&str]) {
        let stderr = self.fails(line);
        for part in parts {
            assert!(stderr.contains(part), "gptq {line}: no {part:?} in {stderr}");
        }
    }

    /// What a program wrote, with the directory's path made short.
    pub fn text(&self, bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).replace(&self.dir().display().to_string(), "DIR")
    }

    /// Every file with its size and time of change.
    pub fn files(&self) -> Vec<String> {
        let (mut found, mut open) = (Vec::new(), vec![self.dir().to_owned()]);
        while let Some(dir) = open.pop() {
            let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            for (path, meta) in
                entries.filter_map(|entry| Some((entry.path(), entry.metadata().ok()?)))
            {
                found.push(format!("{} {} {:?}", path.display(), meta.len(), meta.modified()));
                if meta.is_dir() {
                    open.push(path);
                }
            }
        }
        found.sort();
        found
    }
}
