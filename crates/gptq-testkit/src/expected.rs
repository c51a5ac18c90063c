//! Expected values: safetensors files read into plain vectors.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// An open safetensors file of expected values. Accessors panic with the file and tensor name where
/// a tensor is absent or of another kind.
#[derive(Debug)]
pub struct Expected {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Expected {
    /// Reads the whole file.
    pub fn open(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = Self { path, bytes };
        drop(file.tensors());
        file
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.tensors().names().into_iter().map(ToOwned::to_owned).collect();
        names.sort();
        names
    }

    /// Whether the file holds tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    /// Shape and values of a tensor of floats (f32, f64, f16 or bf16, widened or narrowed to f32),
    /// row-major.
    pub fn f32(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        self.read(name, |dtype, data| match dtype {
            Dtype::F32 => Some(values(data, f32::from_le_bytes)),
            Dtype::F64 => Some(values(data, |bytes| f64::from_le_bytes(bytes) as f32)),
            Dtype::F16 => Some(values(data, |bytes| f16::from_le_bytes(bytes).to_f32())),
            Dtype::BF16 => Some(values(data, |bytes| bf16::from_le_bytes(bytes).to_f32())),
            _ => None,
        })
    }

    /// Shape and values of a tensor of integers (u8, i32 or i64, widened to i64), row-major.
    pub fn i64(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        self.read(name, |dtype, data| match dtype {
            Dtype::I64 => Some(values(data, i64::from_le_bytes)),
            Dtype::I32 => Some(values(data, |bytes| i64::from(i32::from_le_bytes(bytes)))),
            Dtype::U8 | Dtype::BOOL => Some(data.iter().map(|&byte| i64::from(byte)).collect()),
            _ => None,
        })
    }

    /// Shape and values of a tensor of token ids, row-major.
    pub fn tokens(&self, name: &str) -> (Vec<usize>, Vec<u32>) {
        let (shape, ids) = self.i64(name);
        let narrow = |id: i64| {
            u32::try_from(id)
                .unwrap_or_else(|_| panic!("{}: {name}: token {id}", self.path.display()))
        };
        (shape, ids.into_iter().map(narrow).collect())
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    fn read<T>(
        &self,
        name: &str,
        decode: impl Fn(Dtype, &[u8]) -> Option<Vec<T>>,
    ) -> (Vec<usize>, Vec<T>) {
        let file = self.path.display();
        let tensors = self.tensors();
        let view: TensorView<'_> = tensors
            .tensor(name)
            .unwrap_or_else(|_| panic!("{file}: no tensor {name}; it holds {:?}", self.names()));
        let decoded = decode(view.dtype(), view.data());
        let decoded = decoded.unwrap_or_else(|| {
            panic!("{file}: {name} is {:?}, not what the test asks for", view.dtype())
        });
        (view.shape().to_vec(), decoded)
    }
}

fn values<const N: usize, T>(data: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = data.as_chunks::<N>();
    chunks.iter().map(|&bytes| decode(bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_kind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let f: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let h: Vec<u8> = [f16::from_f32(0.25)].iter().flat_map(|x| x.to_le_bytes()).collect();
        let i: Vec<u8> = [7i64, 9].iter().flat_map(|x| x.to_le_bytes()).collect();
        let views = [
            ("f", TensorView::new(Dtype::F32, vec![2], &f).unwrap()),
            ("h", TensorView::new(Dtype::F16, vec![1, 1], &h).unwrap()),
            ("i", TensorView::new(Dtype::I64, vec![2, 1], &i).unwrap()),
        ];
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let file = Expected::open(&path);
        assert_eq!(file.names(), ["f", "h", "i"]);
        assert_eq!(file.f32("f"), (vec![2], vec![1.5, -2.0]));
        assert_eq!(file.f32("h"), (vec![1, 1], vec![0.25]));
        assert_eq!(file.i64("i"), (vec![2, 1], vec![7, 9]));
        assert_eq!(file.tokens("i").1, vec![7u32, 9]);
        assert!(!file.has("j"));
    }

    #[test]
    #[should_panic(expected = "no tensor missing")]
    fn an_absent_tensor_panics_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let none: [(&str, TensorView<'_>); 0] = [];
        std::fs::write(&path, safetensors::serialize(none, None).unwrap()).unwrap();
        Expected::open(&path).f32("missing");
    }
}
