//! The result of a benchmark as tables and as JSON.

use gptq_compute::arch::isa;
use gptq_compute::{Activations, Pool};
use gptq_model::OpCost;
use serde_json::{Value, json};

use super::{Args, Report, Run};
use crate::output::json as json_output;
use crate::output::size;
use crate::output::table::{Align, Table, colour_allowed};

/// Share of the read bandwidth from which on an operation counts as bound by it.
const BANDWIDTH_BOUND: f64 = 0.6;
/// Shorter calls are mostly starting and waiting, in seconds.
const SHORT: f64 = 10e-6;

impl Report {
    /// Share of the read bandwidth that a run reached.
    fn reached(&self, run: &Run) -> f64 {
        run.bytes_per_step as f64 / (run.p50_ms / 1e3) / self.bandwidth
    }

    /// Floating point operations per second of the blocks' linears in the prefill.
    fn prefill_operations(&self, run: &Run) -> f64 {
        2.0 * self.products_per_token as f64 * run.prefill_tokens_per_second
    }

    /// That as a share of the rate that this machine has for such products.
    fn prefill_reached(&self, run: &Run) -> f64 {
        let rate = match self.activations {
            Activations::Int8 => self.int8_rate,
            _ => self.f32_rate,
        };
        self.prefill_operations(run) / rate
    }

    /// What keeps an operation from being faster.
    fn bound(&self, cost: &OpCost) -> &'static str {
        if cost.bytes as f64 / cost.seconds >= BANDWIDTH_BOUND * self.bandwidth {
            "bandwidth"
        } else if cost.seconds / (cost.calls as f64) < SHORT {
            "latency"
        } else {
            "compute"
        }
    }

    fn run_json(&self, run: &Run) -> Value {
        json!({
            "batch": run.batch,
            "prefill_tokens_per_second": run.prefill_tokens_per_second,
            "decode_tokens_per_second": run.decode_tokens_per_second,
            "per_token_ms_p50": run.p50_ms,
            "per_token_ms_p95": run.p95_ms,
            "bytes_per_token": run.bytes_per_step,
            "bandwidth_fraction": self.reached(run),
            "prefill_operations_per_second": self.prefill_operations(run),
            "prefill_fraction": self.prefill_reached(run),
        })
    }

    pub(super) fn print_json(&self, args: &Args, pool: &Pool) -> anyhow::Result<()> {
        // There is a run for each --batch, of which there is at least one.
        let mut value = self.run_json(&self.runs[0]);
        value["bandwidth_fraction"] = self.bandwidth_fraction.into();
        let batches: Vec<Value> = self.runs.iter().map(|run| self.run_json(run)).collect();
        let steps = self.profile_steps.max(1) as f64;
        let ran = self.profile.iter().filter(|(_, cost)| cost.calls > 0);
        let profile: Vec<Value> = ran
            .map(|(op, cost)| {
                json!({
                    "op": op.name(),
                    "calls": cost.calls as f64 / steps,
                    "seconds": cost.seconds / steps,
                    "bytes": cost.bytes as f64 / steps,
                    "bytes_per_second": cost.bytes as f64 / cost.seconds,
                    "bound": self.bound(cost),
                })
            })
            .collect();
        let more = json!({
            "model": self.model,
            "threads": pool.threads(),
            "isa": format!("{:?}", isa()).to_lowercase(),
            "kv_cache": args.runtime.kv_cache.name(),
            "lm_head_bits": args.runtime.lm_head_bits.bits(),
            "activations": Activations::from(args.runtime.activations).name(),
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "load_seconds": self.load_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "weight_bytes": self.weight_bytes,
            "read_bandwidth_bytes_per_second": self.bandwidth,
            "f32_operations_per_second": self.f32_rate,
            "int8_operations_per_second": self.int8_rate,
            "batches": batches,
            "profile": if args.profile { json!(profile) } else { Value::Null },
        });
        if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
            value.extend(more);
        }
        json_output::print(&value)
    }

    pub(super) fn print_tables(&self) -> anyhow::Result<()> {
        let colour = colour_allowed(&std::io::stdout());
        let mut table = Table::new([("", Align::Left), ("value", Align::Right)]);
        let first = &self.runs[0];
        for (label, value) in [
            ("load", format!("{:.2} s", self.load_seconds)),
            ("prefill", format!("{:.1} tokens/s", first.prefill_tokens_per_second)),
            ("decode", format!("{:.1} tokens/s", first.decode_tokens_per_second)),
            ("step, median", format!("{:.2} ms", first.p50_ms)),
            ("step, 95 %", format!("{:.2} ms", first.p95_ms)),
            ("peak memory", self.peak_rss_bytes.map_or_else(|| "unknown".into(), size::bytes)),
            ("read per step", size::bytes(first.bytes_per_step as u64)),
            ("read bandwidth of this machine", format!("{:.1} GB/s", self.bandwidth / 1e9)),
            ("share of it reached", format!("{:.0} %", 100.0 * self.bandwidth_fraction)),
            ("f32 rate of this machine", format!("{:.0} Gop/s", self.f32_rate / 1e9)),
            ("int8 rate of this machine", format!("{:.0} Gop/s", self.int8_rate / 1e9)),
            ("prefill, linears", format!("{:.0} Gop/s", self.prefill_operations(first) / 1e9)),
            ("share of the rate", format!("{:.0} %", 100.0 * self.prefill_reached(first))),
        ] {
            table.row([label.to_owned(), value]);
        }
        let mut text = table.render(colour);
        if self.runs.len() > 1 {
            text.push('\n');
            text.push_str(&self.batch_table().render(colour));
        }
        if !self.profile.is_empty() {
            text.push('\n');
            text.push_str(&self.profile_table().render(colour));
        }
        crate::output::print(&text)
    }

    fn batch_table(&self) -> Table {
        let mut table = Table::new([
            ("batch", Align::Right),
            ("decode tokens/s", Align::Right),
            ("step ms p50", Align::Right),
            ("p95", Align::Right),
            ("of bandwidth", Align::Right),
        ]);
        for run in &self.runs {
            table.row([
                run.batch.to_string(),
                format!("{:.1}", run.decode_tokens_per_second),
                format!("{:.2}", run.p50_ms),
                format!("{:.2}", run.p95_ms),
                format!("{:.0} %", 100.0 * self.reached(run)),
            ]);
        }
        table
    }

    fn profile_table(&self) -> Table {
        let mut table = Table::new([
            ("operation", Align::Left),
            ("calls", Align::Right),
            ("us per step", Align::Right),
            ("share", Align::Right),
            ("MB read", Align::Right),
            ("GB/s", Align::Right),
            ("bound by", Align::Left),
        ]);
        let steps = self.profile_steps as f64;
        let total: f64 = self.profile.iter().map(|(_, cost)| cost.seconds).sum();
        for (op, cost) in self.profile.iter().filter(|(_, cost)| cost.calls > 0) {
            let (bytes, seconds) = (cost.bytes as f64 / steps, cost.seconds / steps);
            let reads = |text: String| if cost.bytes > 0 { text } else { String::new() };
            table.row([
                op.name().to_owned(),
                format!("{}", cost.calls / self.profile_steps.max(1)),
                format!("{:.1}", 1e6 * seconds),
                format!("{:.1} %", 100.0 * cost.seconds / total),
                reads(format!("{:.2}", bytes / 1e6)),
                reads(format!("{:.1}", bytes / seconds / 1e9)),
                self.bound(cost).to_owned(),
            ]);
        }
        table.row(["all".to_owned(), String::new(), format!("{:.1}", 1e6 * total / steps)]);
        table
    }
}
