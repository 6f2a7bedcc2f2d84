//! Pictures of which expert took which patch of image files.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use hexa_ops::{ExpertOps, TrainingBackend};
use image::RgbImage;

use super::checkpoint::write_atomically;
use super::device::read;
use super::error::{Result, TrainError};
use super::images::prepare_file;
use super::inference::{PREDICT_BATCH, Trained, likeliest};
use crate::backend::{BackendKind, Job, dispatch};
use crate::config::Config;
use crate::data::{Pixels, PreparedImage};
use crate::inspect::{
    Entry, Figure, LayerChoices, expert_picture, input_picture, layer_choices, png, render,
};
use crate::model::SwinMoe;

/// Longest part of an image's name in those of its pictures, in characters.
const MAX_STEM: usize = 48;

/// What was drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The page that shows all pictures.
    pub page: PathBuf,
    /// The pictures' files.
    pub pictures: Vec<PathBuf>,
}

impl Trained {
    /// Draws, for each image file and each Mixture-of-Experts layer, the first expert of each patch
    /// over the image, as PNG files and `inspect.html` in the directory `output`, which is made if
    /// it is not there.
    ///
    /// # Errors
    /// [`TrainError`] if the model has no experts, and for the first file that cannot be read or
    /// written.
    pub fn inspect(
        self,
        backend: BackendKind,
        files: &[PathBuf],
        output: &Path,
    ) -> Result<Inspection> {
        let job = Inspect {
            trained: self,
            files: files.to_vec(),
            output: output.to_path_buf(),
        };
        dispatch(backend, job)?
    }
}

struct Inspect {
    trained: Trained,
    files: Vec<PathBuf>,
    output: PathBuf,
}

/// What the model said about a batch of images.
struct Seen {
    /// `[batch, classes]`.
    logits: Vec<f32>,
    layers: Vec<LayerChoices>,
}

impl Job for Inspect {
    type Output = Result<Inspection>;

    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output {
        let faults = self.trained.faults().clone();
        let (model, state, config) = self.trained.model_to_run::<B>(device)?;
        if model.moe_layers().next().is_none() {
            return Err(TrainError::Request(
                "the model has no Mixture-of-Experts layer, so that no expert takes a patch; give \
                 a run whose moe.blocks names some"
                    .to_owned(),
            ));
        }
        fs::create_dir_all(&self.output)
            .map_err(TrainError::io("create the directory", &self.output))?;
        let mut album = Album {
            directory: self.output,
            entries: Vec::new(),
            pictures: Vec::new(),
        };
        for files in self.files.chunks(PREDICT_BATCH) {
            let images = files
                .iter()
                .map(|file| prepare_file(&config, file))
                .collect::<Result<Vec<_>>>()?;
            let seen = look(&model, &config, &images, device)?;
            faults.check("while images were inspected")?;
            let rows = seen.logits.chunks_exact(state.class_names.len().max(1));
            for (index, ((file, image), row)) in files.iter().zip(&images).zip(rows).enumerate() {
                let guesses: Vec<String> = likeliest(row, &state.class_names)
                    .iter()
                    .take(3)
                    .map(|(class, share)| format!("{class} ({:.1} %)", 100.0 * share))
                    .collect();
                let text = format!("taken for: {}", guesses.join(", "));
                album.add(file, text, &image.pixels, &seen.layers, index)?;
            }
        }
        album.finish(&state.name)
    }
}

fn look<B: ExpertOps>(
    model: &SwinMoe<B>,
    config: &Config,
    images: &[PreparedImage],
    device: &B::Device,
) -> Result<Seen> {
    let (channels, size) = (config.model.in_chans, config.model.image_size);
    let values: Vec<f32> = images.iter().flat_map(|i| i.values.clone()).collect();
    let shape = [images.len(), channels, size, size];
    let input = Tensor::from_data(TensorData::new(values, shape), device);
    let output = model.forward(input)?;
    let layers = layer_choices(&output, &model.config().geometry()?)
        .map_err(TrainError::device("while experts' choices were read"))?;
    Ok(Seen {
        logits: read(output.logits, "scores")?.values,
        layers,
    })
}

/// Pictures in a directory, and what the page says about them.
struct Album {
    directory: PathBuf,
    entries: Vec<Entry>,
    pictures: Vec<PathBuf>,
}

impl Album {
    /// Draws the image that is at `index` of the batch.
    fn add(
        &mut self,
        file: &Path,
        text: String,
        pixels: &Pixels,
        layers: &[LayerChoices],
        index: usize,
    ) -> Result<()> {
        let stem = format!("{:03}-{}", self.entries.len() + 1, plain_stem(file));
        let input = format!("{stem}-input.png");
        let mut figures = vec![self.write("input".to_owned(), input, &input_picture(pixels))?];
        for (number, layer) in layers.iter().enumerate() {
            let picture = expert_picture(pixels, layer.image(index), layer.num_experts);
            let caption = format!(
                "MoE layer {number}: stage {}, block {}, {grid} × {grid} patches",
                layer.stage,
                layer.block,
                grid = layer.grid
            );
            let name = format!("{stem}-layer-{number}.png");
            figures.push(self.write(caption, name, &picture)?);
        }
        self.entries.push(Entry {
            title: file.display().to_string(),
            text,
            figures,
        });
        Ok(())
    }

    fn write(&mut self, caption: String, file: String, picture: &RgbImage) -> Result<Figure> {
        let path = self.directory.join(&file);
        let bytes = png(picture).map_err(TrainError::io("encode", &path))?;
        write_atomically(&path, &bytes)?;
        self.pictures.push(path);
        Ok(Figure {
            caption,
            file,
            size: picture.dimensions(),
        })
    }

    fn finish(self, title: &str) -> Result<Inspection> {
        let page = self.directory.join("inspect.html");
        write_atomically(&page, render(title, &self.entries).as_bytes())?;
        Ok(Inspection {
            page,
            pictures: self.pictures,
        })
    }
}

/// The file's name without its ending, in characters that need no escape in file names and links.
fn plain_stem(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    stem.chars()
        .take(MAX_STEM)
        .map(|c| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_' => c,
            _ => '_',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pictures_are_plain() {
        for (file, stem) in [
            ("a/b/cat 1.jpeg", "cat_1"),
            ("../..", ""),
            ("Ä\"<>&#?.png", "_______"),
            ("two.dots.png", "two.dots"),
        ] {
            assert_eq!(plain_stem(Path::new(file)), stem);
        }
        assert_eq!(plain_stem(Path::new(&"é".repeat(300))).len(), MAX_STEM);
    }
}
