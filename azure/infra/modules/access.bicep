// Roles on the workspace and on the identities that a cluster or an endpoint is given.
param workspaceName string
param computeIdentityName string
param endpointIdentityName string
param workspacePrincipalId string
param computePrincipalId string
param endpointPrincipalId string
param workflowPrincipalId string
param withWorkflow bool
param people array

var role = {
  contributor: 'b24988ac-6180-42a0-ab88-20f7382dd24c'
  dataScientist: 'f6c7c914-8db3-469d-8ca1-694a8f32e121'
  computeOperator: 'e503ece1-11d0-4e8e-8e2c-7a6c3bf38815'
  metricsWriter: '635dd51f-9968-44d3-b7fb-6d9a6bd613ae'
  identityOperator: 'f1a07417-d97a-45cb-824c-7a7467783830'
}

resource workspace 'Microsoft.MachineLearningServices/workspaces@2024-10-01' existing = {
  name: workspaceName
}

resource computeIdentity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' existing = {
  name: computeIdentityName
}

resource endpointIdentity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' existing = {
  name: endpointIdentityName
}

resource own 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: workspace
  name: guid(workspace.id, workspacePrincipalId, role.contributor)
  properties: {
    principalId: workspacePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.contributor)
  }
}

// A job registers the model that it made.
resource compute 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: workspace
  name: guid(workspace.id, computePrincipalId, role.dataScientist)
  properties: {
    principalId: computePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.dataScientist)
  }
}

resource endpoint 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: workspace
  name: guid(workspace.id, endpointPrincipalId, role.metricsWriter)
  properties: {
    principalId: endpointPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.metricsWriter)
  }
}

// The workflow makes endpoints, deployments and jobs, but no clusters, and may give an endpoint its identity.
resource workflow 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (withWorkflow) {
  scope: workspace
  name: guid(workspace.id, 'workflow', role.dataScientist)
  properties: {
    principalId: workflowPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.dataScientist)
  }
}

resource workflowEndpoint 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (withWorkflow) {
  scope: endpointIdentity
  name: guid(endpointIdentity.id, 'workflow', role.identityOperator)
  properties: {
    principalId: workflowPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.identityOperator)
  }
}

resource scientists 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for person in people: {
  scope: workspace
  name: guid(workspace.id, person, role.dataScientist)
  properties: {
    principalId: person
    principalType: 'User'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.dataScientist)
  }
}]

resource operators 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for person in people: {
  scope: workspace
  name: guid(workspace.id, person, role.computeOperator)
  properties: {
    principalId: person
    principalType: 'User'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.computeOperator)
  }
}]

resource givesCompute 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for person in people: {
  scope: computeIdentity
  name: guid(computeIdentity.id, person, role.identityOperator)
  properties: {
    principalId: person
    principalType: 'User'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.identityOperator)
  }
}]

resource givesEndpoint 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for person in people: {
  scope: endpointIdentity
  name: guid(endpointIdentity.id, person, role.identityOperator)
  properties: {
    principalId: person
    principalType: 'User'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.identityOperator)
  }
}]
