//! Other slices of the experts, in the middle of a run.

use hexa_ops::TrainingBackend;

use super::error::{Result, TrainError};
use super::session::Session;
use super::setup::restore;

impl<B: TrainingBackend> Session<'_, B> {
    /// Takes the slices that were decided upon, if any, out of the checkpoint that was written just
    /// now, as a resumed run would; all ranks call it together.
    pub(super) fn reslice(&mut self) -> Result<()> {
        let Some((seat, planned)) = self.ranks.pending() else {
            return Ok(());
        };
        self.ranks.barrier("the checkpoint stands")?;
        let (checkpoint, path) = self.run.load_last()?;
        if checkpoint.state.step != self.place.step {
            return Err(TrainError::Checkpoint {
                path,
                reason: format!(
                    "it is of step {}, written was one of step {}",
                    checkpoint.state.step, self.place.step
                ),
                remedy: "check the disk, then resume the run",
            });
        }
        let config = &self.config;
        let restored = restore::<B>(
            checkpoint,
            &path,
            config,
            self.backend,
            &seat,
            planned,
            self.device,
        )?;
        (self.model, self.optimizer, self.ranks) = restored;
        if let Some(shares) = self.ranks.describe() {
            self.progress.say(&shares);
        }
        Ok(())
    }
}
