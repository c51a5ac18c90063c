//! The runs of a sweep over the texts that they were measured on.

use super::map::HeatMap;

/// A value of each run on each text, as colours and numbers. Values that are not positive and finite are
/// left out.
pub(crate) fn text_map(title: &str, texts: &[String], runs: &[(&str, Vec<f64>)]) -> String {
    let valid = |&value: &f64| Some(value).filter(|value| value.is_finite() && *value > 0.0);
    let row = |(name, values): &(&str, Vec<f64>)| {
        ((*name).to_owned(), values.iter().map(valid).collect())
    };
    let rows: Vec<(String, Vec<Option<f64>>)> = runs.iter().map(row).collect();
    let map = HeatMap {
        title,
        rows: &rows,
        columns: texts.len(),
        name: &|text| texts[text].clone(),
        numbers: true,
    };
    map.draw(|svg, bottom, x| {
        for (index, text) in texts.iter().enumerate() {
            svg.text(x(index), bottom + 16.0, "middle", text);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_has_a_number_on_every_text() {
        let runs = [("<a>", vec![0.5, 1.25]), ("b", vec![f64::NAN, 0.125])];
        let svg = text_map("KL", &["one".to_owned(), "two".to_owned()], &runs);
        assert_eq!(svg.matches("<title>").count(), 3);
        for part in [">0.500<", ">1.250<", ">0.125<", "one &lt;a&gt;: 5.000e-1", ">two<"] {
            assert!(svg.contains(part), "{part} {svg}");
        }
        assert!(text_map("KL", &[], &[]).contains("no values"));
    }
}
