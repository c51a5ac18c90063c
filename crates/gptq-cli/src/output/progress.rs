//! Progress on stderr: at most two bars on a terminal, plain lines elsewhere, nothing with
//! `--quiet`.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use gptq_quantize::progress::Progress;
use gptq_quantize::report::{ModuleRecord, TuningRecord};
use gptq_quantize::rss;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::size;

/// Shows a run. Bars show blocks with the time left, and the current phase; lines show one module
/// each.
#[derive(Debug)]
pub(crate) struct ProgressView {
    mode: Mode,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Mode {
    Hidden,
    Lines,
    /// Each bar appears when there is something to show in it, the blocks above the phase.
    Bars {
        blocks: OnceLock<ProgressBar>,
        phase: OnceLock<ProgressBar>,
    },
}

#[derive(Debug, Default)]
struct State {
    eta: Eta,
    total: usize,
    in_block: bool,
    /// A module of the block was quantized.
    solved: bool,
    phase: String,
    /// Tenths of the phase that have had their line.
    tenths: usize,
    /// The last module and its loss.
    module: String,
}

impl ProgressView {
    /// The view for this stderr: nothing if `quiet`, bars on a terminal unless `verbose` (log lines
    /// take their place), otherwise lines.
    pub(crate) fn new(quiet: bool, verbose: bool) -> Self {
        let mode = if quiet {
            Mode::Hidden
        } else if verbose || !std::io::stderr().is_terminal() {
            Mode::Lines
        } else {
            Mode::Bars { blocks: OnceLock::new(), phase: OnceLock::new() }
        };
        Self { mode, state: Mutex::default() }
    }

    /// Whether progress is shown in place.
    pub(crate) fn has_bars(&self) -> bool {
        matches!(self.mode, Mode::Bars { .. })
    }

    /// Takes the bars away, so that what follows starts on a clean line; no block is being quantized
    /// any more.
    pub(crate) fn finish(&self) {
        IN_BLOCKS.store(false, Ordering::SeqCst);
        if let Mode::Bars { blocks, phase } = &self.mode {
            for bar in [phase, blocks].into_iter().filter_map(OnceLock::get) {
                bar.finish_and_clear();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave these few fields in a state that could not be shown.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ProgressView {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Set while blocks are being quantized: from then on there is something to keep.
static IN_BLOCKS: AtomicBool = AtomicBool::new(false);
/// How often the user asked to stop.
static INTERRUPTS: AtomicUsize = AtomicUsize::new(0);

/// Exit code of a command that was stopped by Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// What a command ends with that failed, or was stopped.
pub(crate) fn failure() -> ExitCode {
    if INTERRUPTS.load(Ordering::SeqCst) > 0 {
        return ExitCode::from(INTERRUPTED);
    }
    ExitCode::FAILURE
}

/// The first Ctrl-C while blocks are quantized lets the block finish; the second, or one at any
/// other time, stops at once.
pub(crate) fn catch_interrupts() {
    let caught = ctrlc::set_handler(|| {
        if !IN_BLOCKS.load(Ordering::SeqCst) || INTERRUPTS.fetch_add(1, Ordering::SeqCst) > 0 {
            std::process::exit(INTERRUPTED.into());
        }
        // Nothing can be done about an stderr that cannot be written.
        let _ = writeln!(LogWriter, "finishing this block; Ctrl-C again stops now");
    });
    if let Err(error) = caught {
        tracing::debug!("Ctrl-C is not caught: {error}");
    }
}

impl Progress for ProgressView {
    fn interrupted(&self) -> bool {
        INTERRUPTS.load(Ordering::SeqCst) > 0
    }

    fn phase(&self, name: &str) {
        let mut state = self.state();
        name.clone_into(&mut state.phase);
        state.tenths = 0;
        match &self.mode {
            Mode::Bars { phase, .. } => {
                let bar = shown(phase.get_or_init(|| screen().add(bar(PHASE_BAR))));
                bar.set_length(1);
                bar.set_position(0);
                bar.set_prefix(name.to_owned());
            }
            // Inside a block the modules' lines tell enough.
            Mode::Lines if !state.in_block => line(name),
            Mode::Lines | Mode::Hidden => {}
        }
    }

    fn phase_progress(&self, done: usize, total: usize) {
        let mut state = self.state();
        match &self.mode {
            Mode::Bars { phase, .. } => {
                if let Some(bar) = phase.get() {
                    bar.set_length(total as u64);
                    bar.set_position(done as u64);
                }
            }
            Mode::Lines if !state.in_block && total > 0 => {
                let tenths = done.saturating_mul(10) / total;
                if tenths > state.tenths {
                    state.tenths = tenths;
                    line(&format!("{} {done}/{total}", state.phase));
                }
            }
            Mode::Lines | Mode::Hidden => {}
        }
    }

    fn block_started(&self, index: usize, total: usize) {
        IN_BLOCKS.store(true, Ordering::SeqCst);
        let mut state = self.state();
        state.total = total;
        (state.in_block, state.solved) = (true, false);
        state.eta.start(Instant::now());
        if let Mode::Bars { blocks, .. } = &self.mode {
            let bar = shown(blocks.get_or_init(|| screen().insert(0, bar(BLOCK_BAR))));
            bar.set_length(total as u64);
            bar.set_position(index as u64);
            bar.set_message(state.message());
        }
    }

    fn module_done(&self, record: &ModuleRecord) {
        let mut state = self.state();
        state.solved = true;
        match &self.mode {
            Mode::Bars { blocks, .. } => {
                state.module = format!("{}  loss {:.2e}", record.module, record.loss);
                if let Some(bar) = blocks.get() {
                    bar.set_message(state.message());
                }
            }
            Mode::Lines => line(&module_line(record, state.total)),
            Mode::Hidden => {}
        }
    }

    fn block_tuned(&self, record: &TuningRecord) {
        let mut state = self.state();
        match &self.mode {
            Mode::Bars { blocks, .. } => {
                state.module = tuned(record);
                if let Some(bar) = blocks.get() {
                    bar.set_message(state.message());
                }
            }
            Mode::Lines => line(&tuning_line(record, state.total)),
            Mode::Hidden => {}
        }
    }

    fn block_done(&self, index: usize) {
        let mut state = self.state();
        let left = state.total.saturating_sub(index + 1);
        if state.solved {
            state.eta.stop(Instant::now(), left);
        } else {
            // Replayed behind --resume, which says nothing of those to be solved.
            state.eta.started = None;
        }
        state.in_block = false;
        match &self.mode {
            Mode::Bars { blocks, .. } => {
                if let Some(bar) = blocks.get() {
                    bar.set_position(index as u64 + 1);
                    bar.set_message(state.message());
                }
            }
            Mode::Lines => {
                if let Some(left) = state.eta.left(Instant::now()) {
                    line(&format!(
                        "layer {}/{} done, {} to go",
                        index + 1,
                        state.total,
                        size::clock(left)
                    ));
                }
            }
            Mode::Hidden => {}
        }
    }
}

impl State {
    /// What stands behind the bar of blocks.
    fn message(&self) -> String {
        let mut parts = Vec::new();
        if let Some(left) = self.eta.left(Instant::now()) {
            parts.push(format!("eta {}", size::clock(left)));
        }
        if !self.module.is_empty() {
            parts.push(self.module.clone());
        }
        if let Some(resident) = rss::current_bytes() {
            parts.push(size::bytes(resident));
        }
        parts.join("  ")
    }
}

/// The time left, from the mean over the last blocks. The first block also warms caches and is left
/// out as soon as there is another.
#[derive(Debug, Default)]
struct Eta {
    started: Option<Instant>,
    first: Option<Duration>,
    recent: VecDeque<Duration>,
    left: usize,
}

impl Eta {
    fn start(&mut self, now: Instant) {
        self.started = Some(now);
    }

    fn stop(&mut self, now: Instant, left: usize) {
        self.left = left;
        let Some(started) = self.started.take() else {
            return;
        };
        let span = now.duration_since(started);
        if self.first.is_none() {
            self.first = Some(span);
            return;
        }
        if self.recent.len() == ETA_BLOCKS {
            self.recent.pop_front();
        }
        self.recent.push_back(span);
    }

    /// `None` before the first block is over and after the last.
    fn left(&self, now: Instant) -> Option<Duration> {
        let mean = match u32::try_from(self.recent.len()) {
            Ok(count) if count > 0 => self.recent.iter().sum::<Duration>() / count,
            _ => self.first?,
        };
        let blocks = u32::try_from(self.left).ok().filter(|&left| left > 0)?;
        let spent = self.started.map_or(Duration::ZERO, |started| now.duration_since(started));
        Some((mean * blocks).saturating_sub(spent))
    }
}

/// One line per module where no bar can be drawn.
fn module_line(record: &ModuleRecord, blocks: usize) -> String {
    let ModuleRecord { layer, module, shape: [out, inputs], bits, group_size, loss, .. } = record;
    let group = if *group_size < 0 { "all".to_owned() } else { format!("g{group_size}") };
    let span = Duration::from_secs_f64(record.seconds.clamp(0.0, 1e9));
    let fit = match record.relative_output_error {
        Some(error) => format!("loss {loss:.2e}  error {error:.2e}"),
        None => "rounded".to_owned(),
    };
    let shape = format!("{out}x{inputs}");
    let width = blocks.to_string().len();
    let mut text = format!(
        "layer {:>width$}/{blocks}  {module:<18}  {shape:<11}  {bits}-bit {group}  {fit}  {}",
        layer + 1,
        size::duration(span)
    );
    if let Some(resident) = record.rss_bytes {
        text.push_str("  ");
        text.push_str(&size::bytes(resident));
    }
    text
}

fn tuned(record: &TuningRecord) -> String {
    let TuningRecord { error_before, error_after, kept, .. } = record;
    let after = error_after.map_or("not a number".to_owned(), |error| format!("{error:.2e}"));
    let dropped = if *kept { "" } else { "  dropped" };
    format!("tuned  output error {error_before:.2e} -> {after}{dropped}")
}

fn tuning_line(record: &TuningRecord, blocks: usize) -> String {
    let width = blocks.to_string().len();
    let span = size::duration(Duration::from_secs_f64(record.seconds.clamp(0.0, 1e9)));
    format!("layer {:>width$}/{blocks}  {}  {span}", record.layer + 1, tuned(record))
}

/// Where log lines go, so that they do not tear the bars: give `|| LogWriter` to the log
/// subscriber.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        screen().suspend(|| std::io::stderr().write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// The one owner of the terminal's last lines.
fn screen() -> &'static MultiProgress {
    static SCREEN: OnceLock<MultiProgress> = OnceLock::new();
    SCREEN.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
}

fn bar(template: &str) -> ProgressBar {
    // The templates are constants, which a test parses.
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(1).with_style(style.progress_chars("█▉▊▋▌▍▎▏ "))
}

/// A bar that [`ProgressView::finish`] took away is shown again.
fn shown(bar: &ProgressBar) -> &ProgressBar {
    if bar.is_finished() {
        bar.reset();
    }
    bar
}

fn line(text: &str) {
    // Progress is not worth failing for when stderr is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

const BLOCK_BAR: &str = "layer {pos:>3}/{len:3} ▕{bar:20}▏ {percent:>3}%  {msg}";
const PHASE_BAR: &str = "{prefix:13} ▕{bar:20}▏ {percent:>3}%  {pos}/{len}";

/// Blocks in the moving average.
const ETA_BLOCKS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_parse() {
        for template in [BLOCK_BAR, PHASE_BAR] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }

    #[test]
    fn the_time_left_forgets_the_first_block_and_counts_down() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut eta = Eta::default();
        assert_eq!(eta.left(at(0)), None);
        eta.start(at(0));
        assert_eq!(eta.left(at(5)), None);
        eta.stop(at(30), 3);
        assert_eq!(eta.left(at(30)), Some(Duration::from_secs(90)));
        eta.start(at(30));
        assert_eq!(eta.left(at(35)), Some(Duration::from_secs(85)));
        eta.stop(at(40), 2);
        assert_eq!(eta.left(at(40)), Some(Duration::from_secs(20)));
        eta.start(at(40));
        assert_eq!(eta.left(at(100)), Some(Duration::ZERO));
        eta.stop(at(50), 0);
        assert_eq!(eta.left(at(50)), None);
    }

    #[test]
    fn bars_come_back_and_replayed_blocks_do_not_count() {
        let mode = Mode::Bars { blocks: OnceLock::new(), phase: OnceLock::new() };
        let view = ProgressView { mode, state: Mutex::default() };
        let Mode::Bars { phase, .. } = &view.mode else { unreachable!() };
        view.phase("calibration");
        view.finish();
        assert!(phase.get().unwrap().is_finished());
        view.phase("write");
        assert!(!phase.get().unwrap().is_finished());
        for index in 0..2 {
            view.block_started(index, 3);
            if index == 1 {
                view.module_done(&record());
            }
            view.block_done(index);
            assert_eq!(view.state().eta.left(Instant::now()).is_some(), index == 1, "{index}");
        }
    }

    fn record() -> ModuleRecord {
        ModuleRecord {
            layer: 4,
            module: "mlp.down_proj".into(),
            shape: [576, 1536],
            bits: 4,
            group_size: 128,
            loss: 0.0127,
            relative_output_error: Some(0.00123),
            damp_percent: 0.05,
            damp_tries: 1,
            shrink: 0.0,
            nsamples: 262_144,
            expert: None,
            awq: None,
            seconds: 0.9,
            rss_bytes: Some(3 << 30),
        }
    }

    #[test]
    fn a_module_is_one_plain_line() {
        assert_eq!(
            module_line(&record(), 16),
            "layer  5/16  mlp.down_proj       576x1536     4-bit g128  loss 1.27e-2  error 1.23e-3  0.90 s  3.00 GiB"
        );
    }
}
