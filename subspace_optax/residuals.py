# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What happens to the part of the gradient outside the subspace."""

from subspace_optax._residuals._apollo import apollo as apollo
from subspace_optax._residuals._base import Residual as Residual
from subspace_optax._residuals._error_feedback import (
  error_feedback as error_feedback,
)
from subspace_optax._residuals._fira import fira as fira
from subspace_optax._residuals._orthogonal import orthogonal as orthogonal
from subspace_optax._residuals._sign import sign as sign
